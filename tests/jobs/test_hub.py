"""Models and data of the hub, as a machine without network sees them."""

import os
import subprocess
import sys

from tests.support.ranks import REPO


def test_models_of_the_hub_come_from_its_cache(tmp_path):
    """Without a network a cached model is found, and another one is refused in one line."""
    cached = tmp_path / "hub" / "models--org--small"
    commit = "0" * 40
    (cached / "refs").mkdir(parents=True)
    (cached / "refs" / "main").write_text(commit)
    (cached / "snapshots" / commit).mkdir(parents=True)
    (cached / "snapshots" / commit / "config.json").write_text("{}")
    script = (
        "import sys; from ubsmoe_ds.models.hub import model_folder; from ubsmoe_ds.base.errors import UserError\n"
        "try: print(model_folder(sys.argv[1]))\nexcept UserError as error: print(error)"
    )
    environment = os.environ | {"HF_HOME": str(tmp_path), "HF_HUB_CACHE": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "1"}
    expected = {
        "hub:org/small": str(cached / "snapshots" / commit),
        "hub:org/small@main": str(cached / "snapshots" / commit),
        "hub:org/other": "model.path: 'hub:org/other' cannot be fetched (",
        "hub:not a name": "model.path: 'hub:not a name' cannot be fetched (",
    }
    for path, beginning in expected.items():
        command = [sys.executable, "-c", script, path]
        printed = subprocess.check_output(command, env=environment, text=True, cwd=REPO)
        assert printed.startswith(beginning) and printed.count("\n") == 1
