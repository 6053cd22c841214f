"""Where a configuration's model lies."""

from __future__ import annotations

from pathlib import Path

from jaxtune.config import Config
from jaxtune.config.paths import located
from jaxtune.errors import UserError
from jaxtune.models import resolve_path
from jaxtune.models.loading import PACKAGED


def model_directory(config: Config) -> Path:
    """Where the model's configuration and tokenizer lie; its weights too, unless it has a Hub id.

    Raises:
      UserError: there is no such model.
    """
    model = located(config).model
    try:
        return resolve_path(model.path, model.revision, weights=False)
    except UserError as error:
        relative = not (model.path.startswith(PACKAGED) or Path(model.path).expanduser().is_absolute())
        folders = config.paths_from if relative else ()
        looked = f" (looked for in {' and '.join(folders)}, as paths_from says)" if folders else ""
        raise UserError(f"model.path: {error}{looked}") from error
