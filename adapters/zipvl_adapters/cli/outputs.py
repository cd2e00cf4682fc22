"""Output files that appear whole or not at all."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def whole_files(folder: Path) -> Iterator[Path]:
    """Give a temporary folder beside `folder`; what was written to it moves into `folder` when the block succeeds.

    After an error or Ctrl-C in the block, `folder` is as it was before and nothing else is left behind. Files of the
    same name are replaced, each in one step; other files in `folder` stay.
    """
    created = [path for path in (folder, *folder.absolute().parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    workspace = Path(tempfile.mkdtemp(prefix=".unfinished-", dir=folder))
    try:
        yield workspace
        for file in sorted(workspace.iterdir()):
            os.replace(file, folder / file.name)
    except BaseException:
        shutil.rmtree(workspace, ignore_errors=True)
        for path in created:  # innermost first; a folder that another process has filled meanwhile stays
            try:
                path.rmdir()
            except OSError:
                break
        raise
    workspace.rmdir()
