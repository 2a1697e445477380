"""Write requirements.lock: what the Makefile installs, pinned and hashed, for every Python that is supported.

    python .ci/lock.py        (needs uv)

The lock has sections. Each holds what its commands need beside the sections before it, so that `make train` installs no
test tools, and `make test` no documentation tools. Markers give each Python the newest release of a package that it can
have: Python 3.11 stays at jax 0.10.2.
"""

import pathlib
import re
import subprocess
import tempfile

ROOT = pathlib.Path(__file__).parent.parent
SECTIONS = {"train": ["train", "build"], "test": ["tests"], "check": ["lint", "docs"]}
"""The optional dependencies of pyproject.toml that each section adds."""

HEAD = """\
# Written by `make lock`. Each section holds what its commands need beside the sections before it.
"""


def resolve(extras: list[str], constraints: str) -> str:
    """The pinned requirements of some extras."""
    with tempfile.NamedTemporaryFile("w", suffix=".txt") as file:
        file.write(re.sub(r" \\\n    --hash=\S+", "", constraints))
        file.flush()
        command = ["uv", "pip", "compile", "pyproject.toml", "--quiet", "--no-header", "--no-annotate"]
        command += ["--universal", "--python-version", "3.11", "--fork-strategy", "requires-python"]
        command += ["--generate-hashes", "--no-emit-index-url", "--constraint", file.name]
        command += [part for extra in extras for part in ("--extra", extra)]
        return subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout


def entries(text: str) -> dict[str, str]:
    """Each requirement with its hashes, by its first line."""
    found = re.findall(r"^\w.*(?:\n .*)*\n", text, re.M)
    return {entry.split(" \\\n")[0]: entry for entry in found}


def main() -> None:
    """Resolve everything at once, then ask what each section needs of it."""
    everything = resolve([extra for extras in SECTIONS.values() for extra in extras], "")
    hashed, so_far, text, written = entries(everything), [], HEAD, set()
    for section, extras in SECTIONS.items():
        so_far += extras
        needed = entries(resolve(so_far, everything)).keys() - written
        text += f"\n# == {section} ==\n" + "".join(hashed[name] for name in hashed if name in needed)
        written |= needed
    if missing := hashed.keys() ^ written:
        raise SystemExit(f"in one of the lock and its sections alone: {', '.join(sorted(missing))}")
    (ROOT / "requirements.lock").write_text(text)


if __name__ == "__main__":
    main()
