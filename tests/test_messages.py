"""Frames cross a pipe as a descriptor; errors keep their type."""

from __future__ import annotations

import gc
import multiprocessing
import pickle
from multiprocessing.connection import Connection

import numpy as np
import psutil

from sgld import errors
from sgld.messages import SharedFrames


def crossed(frames: SharedFrames, there: Connection, here: Connection) -> SharedFrames:
    there.send(frames)
    frames.send(there)
    received: SharedFrames = here.recv()
    received.receive(here)
    return received


def test_frames_cross_without_their_pixels() -> None:
    frames = np.random.default_rng(0).integers(0, 256, (9, 64, 48, 3), dtype=np.uint8)
    shared = SharedFrames.of(frames)
    assert len(pickle.dumps(shared)) < 1000 < frames.nbytes
    ours, theirs = multiprocessing.Pipe()
    with ours, theirs:
        received = crossed(shared, theirs, ours)
    assert received.shape == (9, 64, 48, 3)
    assert (received.array == frames).all()
    received.array[0, 0, 0] = 7
    assert (shared.array[0, 0, 0] == 7).all(), "the same memory, not a copy"


def test_frames_leave_no_descriptor() -> None:
    ours, theirs = multiprocessing.Pipe()
    with ours, theirs:
        before = psutil.Process().num_fds()
        for _ in range(5):
            view = crossed(SharedFrames.of(np.zeros((1, 8, 8, 3), np.uint8)), theirs, ours).array[0]
        assert view.shape == (8, 8, 3), "a view outlives its frames' descriptor"
        del view
        gc.collect()
        assert psutil.Process().num_fds() <= before


def test_nearest_names() -> None:
    assert (
        errors.nearest("num_infrence_steps", ["num_inference_steps", "seed"]) == "; did you mean num_inference_steps?"
    )
    assert errors.nearest("zzz", ["num_inference_steps", "seed"]) == ""
