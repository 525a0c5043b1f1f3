# SPDX-License-Identifier: Apache-2.0
"""Commands of a shell, each in a fork of one process that has imported what they need, and what their tokenizers read.

As a script it takes a command a line from its input, as JSON, and answers each with its exit code. A command gets a
process of its own, as in a shell, without the many seconds of imports.
"""

from __future__ import annotations

import json
import os
import runpy
import subprocess
import sys
import traceback
from collections.abc import Mapping
from pathlib import Path


class ForkedCommands:
    """Runs commands one after the other in a folder, while used as a context manager.

    Args:
        folder (`Path`): The working directory of all.
        environment (`Mapping`): What is added to the environment, before anything is imported.
    """

    def __init__(self, folder: Path, environment: Mapping[str, str]) -> None:
        self.folder, self.environment = folder, {**os.environ, **environment}

    def __enter__(self) -> ForkedCommands:
        self.process = subprocess.Popen(
            [sys.executable, __file__], cwd=self.folder, env=self.environment, text=True, stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )  # fmt: skip
        return self

    def __exit__(self, *_: object) -> None:
        self.process.stdin.close()
        self.process.wait()

    def __call__(self, words: list[str]) -> dict[str, set[str]]:
        """Runs a command, which must end well. Returns what each tokenizer read, by the name it was loaded by."""
        output, texts = self.folder / "output.txt", self.folder / "texts.jsonl"
        texts.unlink(missing_ok=True)
        print(json.dumps([words, str(output), str(texts)]), file=self.process.stdin, flush=True)
        code = self.process.stdout.readline().strip()
        assert code == "0", f"{' '.join(words)}\nended with {code}:\n{output.read_text()[-3000:]}"
        read: dict[str, set[str]] = {}
        for line in texts.read_text().splitlines() if texts.exists() else ():
            name, text = json.loads(line)
            read.setdefault(name, set()).add(text)
        return read


def run(words: list[str]) -> int:
    """A command of `trl-parm`, or TRL's script of the verb, as `trl VERB` starts it."""
    program, verb, *flags = words
    if program == "trl-parm":
        from trl_parm.cli.main import main

        return main([verb, *flags])
    sys.argv = [f"{verb}.py", *flags]
    runpy.run_module(f"trl.scripts.{verb}", run_name="__main__")
    return 0


def note_texts(path: str) -> None:
    """Writes what tokenizers make of their input, with its special tokens and without padding."""
    from transformers import PreTrainedTokenizerFast

    encode, seen = PreTrainedTokenizerFast._encode_plus, set()

    def noting(self, *args, **kwargs):
        found = encode(self, *args, **kwargs)
        ids, mask = found["input_ids"], found.get("attention_mask")
        rows = ids.tolist() if hasattr(ids, "tolist") else ids
        masks = mask.tolist() if hasattr(mask, "tolist") else mask
        if rows and not isinstance(rows[0], list):
            rows, masks = [rows], [masks] if masks is not None else None
        for i, row in enumerate(rows):
            kept = [token for token, used in zip(row, masks[i] if masks is not None else row) if used or masks is None]
            entry = json.dumps([str(self.name_or_path), self.decode(kept, skip_special_tokens=False)])
            if entry not in seen:
                seen.add(entry)
                with open(path, "a") as file:
                    print(entry, file=file)
        return found

    PreTrainedTokenizerFast._encode_plus = noting


def main() -> None:
    import trl.scripts.dpo  # noqa: F401
    from trl import DPOTrainer  # noqa: F401

    import trl_parm.evaluation.evaluate
    import trl_parm.training.trainer  # noqa: F401

    for line in sys.stdin:
        words, output, texts = json.loads(line)
        child = os.fork()
        if child == 0:
            with open(output, "w") as file:
                os.dup2(file.fileno(), 1)
                os.dup2(file.fileno(), 2)
            code = 1
            try:
                note_texts(texts)
                code = run(words)
            except SystemExit as error:
                code = error.code if isinstance(error.code, int) else int(error.code is not None)
            except BaseException:
                traceback.print_exc()
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)


if __name__ == "__main__":
    main()
