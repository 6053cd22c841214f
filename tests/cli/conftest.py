from tests.tiny_task import config_file, rows, tiny_model

__all__ = ["config_file", "rows", "tiny_model"]
