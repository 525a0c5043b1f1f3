# SPDX-License-Identifier: Apache-2.0
"""Runs PEFT's own generic test matrix on our adapters, offline but for PEFT's source package, which has the tests.

    python tests/peft_matrix/run.py [--config PBLoraConfig] [--suites custom,decoder] [-- pytest arguments]

The tests of the installed PEFT version are taken from its source package and kept in `build/peft_matrix`, together
with the tiny models they use; neither is part of this repository.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from importlib.metadata import version
from pathlib import Path

from models import build_cache


HERE = Path(__file__).resolve().parent
BUILD = HERE.parents[1] / "build" / "peft_matrix"
CONFIGS = ("PBLoraConfig", "SVDLoraConfig", "MoSLoraConfig")
SUITES = {
    "custom": "test_custom_models.py",
    "config": "test_config.py",
    "decoder": "test_decoder_models.py",
    "encoder-decoder": "test_encoder_decoder_models.py",
    "feature-extraction": "test_feature_extraction_models.py",
    "sequence-classification": "test_seq_classifier.py",
    "token-classification-and-qa": "test_token_classification_qa.py",
    "quantization": "test_quantization.py",
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", action="append", choices=CONFIGS, help="default: all of them")
    parser.add_argument("--suites", default=",".join(name for name in SUITES if name != "quantization"))
    parser.add_argument("rest", nargs="*", help="after --, for pytest")
    args = parser.parse_args()
    root = fetch_tests()
    build_cache(BUILD / "hub")
    files = [f"tests/{SUITES[name]}" for name in args.suites.split(",")]
    status = 0
    for config in args.config or CONFIGS:
        print(f"== {config}", flush=True)
        status |= subprocess.run(
            [sys.executable, "-m", "pytest", "-q", "-p", "plugin", "-p", "no:cacheprovider", "--tb=short", "-n", "2",
             "-W", "ignore", "-o", "addopts=", "--rootdir", str(root), *files, *args.rest],
            cwd=root, env=environment(config, root),
        ).returncode  # fmt: skip
    return status


def environment(config: str, root: Path) -> dict[str, str]:
    return {
        **os.environ,
        "PEFT_MATRIX_CONFIG": config,
        "PYTHONPATH": os.pathsep.join([str(HERE), str(root), str(HERE.parents[1])]),
        "HF_HUB_CACHE": str(BUILD / "hub"),
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }


def fetch_tests() -> Path:
    """The folder with the `tests` package of the installed PEFT, downloaded once."""
    root = BUILD / f"peft-{version('peft')}"
    if not (root / "tests").exists():
        with tempfile.TemporaryDirectory() as folder:
            command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--no-binary", "peft", "-d", folder]
            subprocess.run([*command, f"peft=={version('peft')}"], check=True)
            with tarfile.open(next(Path(folder).glob("peft-*.tar.gz"))) as archive:
                archive.extractall(folder, filter="data")
            root.mkdir(parents=True, exist_ok=True)
            shutil.copytree(Path(folder) / root.name / "tests", root / "tests")
        (root / "tests" / "__init__.py").touch()
    return root


if __name__ == "__main__":
    sys.exit(main())
