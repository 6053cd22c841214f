from tests.tiny_task import tiny_model

__all__ = ["tiny_model"]
