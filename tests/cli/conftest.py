from tests.training.conftest import _no_backend_from_outside, make_base, write_rows

__all__ = ["_no_backend_from_outside", "make_base", "write_rows"]
