"""The embedded demo model: the scenes it is taught and the stages that train it."""
