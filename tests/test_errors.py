"""Errors cross a pipe, are restored from records, and own their field."""

from __future__ import annotations

import pickle

import pytest

from sgld import errors
from sgld.errors import BadRequest, MissingFile, QueueFull


@pytest.mark.parametrize("kind", list(errors._tree(errors.SgldError)))
def test_errors_survive_a_pipe_and_their_code(kind: type[errors.SgldError]) -> None:
    error = pickle.loads(pickle.dumps(kind("message", "field")))
    assert (type(error), error.message, error.param) == (kind, "message", "field")
    restored = type(errors.from_code(kind.code, "message", "field"))
    assert restored is (kind if "code" in vars(kind) else kind.__base__)


def test_a_field_is_renamed_on_the_error() -> None:
    error = MissingFile(": no such file", field="image_path", file="/srv/a.png")
    error = pickle.loads(pickle.dumps(error))
    assert (str(error), error.param) == ("image_path: '/srv/a.png': no such file", "image_path")
    other = error.renamed("image[]")
    assert (str(other), other.param, type(other)) == ("image[]: '/srv/a.png': no such file", "image[]", MissingFile)
    hidden = error.renamed(None, f"the picture 'a'{error.reason}")
    assert (str(hidden), hidden.param, hidden.file) == ("the picture 'a': no such file", None, None)
    assert str(error).startswith("image_path"), "the first one stays as it is"


def test_a_param_may_stand_beside_the_text() -> None:
    error = BadRequest("nothing to do", "id")
    assert (error.message, error.param, error.field) == ("nothing to do", "id", None)
    assert QueueFull("full", retry_after=7).renamed("id").retry_after == 7
