"""A recipe on a Hub of the loopback, signed, with a base and a LoRA that are there too: published by the real stage."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from lora_fuse.recipe.records import ReleaseList, from_json
from lora_fuse.release.contents import LIST
from stages.publish import publish
from tests.hub_server import LoopbackHub
from tests.support.released import REPO, Project, on_the_hub, private_key, public_key

FULL = "alice/full"


@dataclass
class Published:
    """A Hub with a release as a recipe (`REPO`, tag v1) and with its weights (`FULL`), and the key of both.

    `root` has the project, and files and links of nobody else.
    """

    root: Path
    hub: LoopbackHub
    key: Path
    public: Path

    @property
    def listing(self) -> ReleaseList:
        return from_json(ReleaseList, self.hub.read(REPO, LIST), LIST)

    def folder(self, target: Path, repository: str = REPO) -> Path:
        """The files of a repository, as somebody may have fetched them."""
        for name in self.hub.registry.repos[repository].head.tree:
            path = target / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(self.hub.read(repository, name))
        (target / ".gitattributes").unlink(missing_ok=True)
        return target


@contextmanager
def on_a_hub(root: Path, *overrides: str) -> Iterator[Published]:
    """Build and publish a project in `root`; the environment names its Hub, and a home for its cache that is empty."""
    (root / "project").mkdir()
    key = private_key(root / "signing.pem")
    with pytest.MonkeyPatch.context() as patch, LoopbackHub(root / "hub").run() as hub:
        for name, value in (("ENDPOINT", hub.url), ("HOME", str(root / "home")), ("TOKEN", "hf_write")):
            patch.setenv(f"HF_{name}", value)
        project = Project(root / "project", patch, [*on_the_hub(hub, root, "apache-2.0", "mit"), *overrides])
        project.build()
        signing = f"publish.signing.key={key}"
        assert publish(project.params(signing, "publish.weights=recipe", "publish.tag=v1")) == 0
        assert publish(project.params(signing, f"publish.repo_id={FULL}")) == 0
        patch.setenv("HF_HOME", str(root / "elsewhere"))
        patch.delenv("HF_TOKEN")
        patch.chdir(root)
        yield Published(root, hub, key, public_key(key))
