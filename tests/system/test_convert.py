"""The conversion command: there and back, killed with SIGKILL, and one sentence for bad input."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

from launch.convert import main
from tests.huggingface.hf_folders import BF16, FP8, RAGGED, bytes_of, flip_a_bit, lively, save_checkpoint, tensors_of
from train.data.tokenizer import load_tokenizer
from train.huggingface.weights import open_weights

Run = Callable[..., subprocess.CompletedProcess[str]]
# The second file is never finished.
DYING = """
import os, signal, sys
from train.huggingface import safetensors_files
write, calls = safetensors_files.write_file, []
def dying(path, file, values):
    calls.append(path)
    def some():
        for chunk in values:
            yield chunk
            if len(calls) == 2:
                os.kill(os.getpid(), signal.SIGKILL)
    write(path, file, some())
safetensors_files.write_file = dying
from launch.convert import main
sys.exit(main(sys.argv[1:]))
"""


@pytest.fixture(scope="module")
def run(store: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run's folder with one checkpoint, trained on the store of these tests."""
    folder = tmp_path_factory.mktemp("runs") / "ragged"
    sha256 = load_tokenizer(store / "tokenizer.json").sha256
    path = folder / "checkpoints/step_00000007"
    save_checkpoint(path, lively(RAGGED, FP8), store=store / "train", tokenizer_sha256=sha256)
    return folder


@pytest.mark.parametrize("format", ["fp32", "bf16", "fp8"])
def test_there_and_back_with_every_proof(
    run: Path, store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], format: str
) -> None:
    out, back, again = (str(tmp_path / name) for name in ("out", "back", "again"))
    asked = ["--format", format, "--shard-size", "300KB", "--verify"]
    assert main(["export", str(run), out, *asked, "--logits"]) == 0
    said = capsys.readouterr().out
    # The bound of the command itself; FP32 in both implementations, FP8 dequantised.
    found = re.search(r"logits, relative: (\S+) to transformers", said)
    assert found is not None, said
    assert float(found[1]) < 1e-5
    assert "verified:" in said
    assert ("FP8 within 0.5" in said) == (format == "fp8")
    assert main(["import", out, back, "--dtype", "fp32", "--verify"]) == 0
    assert main(["export", back, again, "--format", "fp32", "--verify"]) == 0
    # Nothing is lost on the way back: FP32 holds BF16, and payload x scale.
    values = open_weights(Path(out))
    for name in values.names():
        assert torch.equal(open_weights(Path(again)).read(name), values.read(name).float()), name
    text = "In the beginning, the king said unto his people\n\n"
    tokenizer = load_tokenizer(store / "tokenizer.json")
    # What the run's own samples begin with.
    expected = [tokenizer.special_ids.eos, *tokenizer.encode_batch([text])[0]]
    assert AutoTokenizer.from_pretrained(again)(text)["input_ids"] == expected


def test_a_damaged_source_is_not_proved(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    damaged = shutil.copytree(run, tmp_path / "damaged")
    shard = flip_a_bit(max((damaged / "checkpoints/step_00000007").glob("*.safetensors")))
    assert main(["export", str(damaged), str(tmp_path / "out"), "--format", "fp32", "--verify"]) == 2
    assert shard.name in capsys.readouterr().err


def test_a_killed_command_goes_on_with_the_same_bytes(
    run: Path, tmp_path: Path, run_command: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = ("export", run, tmp_path / "killed", "--format", "fp8", "--shard-size", "300KB")
    died = run_command("-c", DYING, *asked, check=False)
    assert died.returncode == -9, died.stderr
    assert len(list((tmp_path / "killed").glob("model-*"))) == 1
    assert not (tmp_path / "killed/config.json").exists()
    assert main(list(map(str, asked))) == 0
    done = capsys.readouterr().out
    assert main(["export", str(run), str(tmp_path / "whole"), *map(str, asked[3:])]) == 0
    assert bytes_of(tmp_path / "killed") == bytes_of(tmp_path / "whole")
    num_files = len(list((tmp_path / "whole").glob("model-*")))
    assert f"{num_files - 1} files written now" in done


def test_a_hugging_face_folder_is_exported_in_another_format(run: Path, tmp_path: Path) -> None:
    """FP8 to BF16, as the released model's users ask for."""
    for source, out, format in ((run, "fp8", "fp8"), (tmp_path / "fp8", "bf16", "bf16")):
        assert main(["export", str(source), str(tmp_path / out), "--format", format, "--verify"]) == 0
    expected, found = open_weights(tmp_path / "fp8"), open_weights(tmp_path / "bf16")
    for name in expected.names():
        value = expected.read(name)
        assert torch.equal(found.read(name), value if "e_score" in name else value.bfloat16()), name
    assert not [name for name in tensors_of(tmp_path / "bf16") if name.endswith("scale_inv")]


def test_without_its_store_an_export_says_that_it_has_no_tokeniser(
    store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "moved/checkpoints/step_00000007"
    save_checkpoint(path, lively(RAGGED, BF16))
    assert main(["export", str(path), str(tmp_path / "out")]) == 0
    assert "without a tokeniser" in capsys.readouterr().out
    assert not (tmp_path / "out/tokenizer.json").exists()
    chosen = store / "tokenizer.json"
    assert main(["export", str(path), str(tmp_path / "with"), "--tokenizer", str(chosen)]) == 0
    assert load_tokenizer(tmp_path / "with/tokenizer.json").json_text == chosen.read_text()


def test_an_export_whose_tokeniser_was_changed_is_not_imported(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["export", str(run), str(tmp_path / "out")]) == 0
    tokenizer = tmp_path / "out/tokenizer.json"
    tokenizer.write_text(tokenizer.read_text() + "\n")
    assert main(["import", str(tmp_path / "out"), str(tmp_path / "back")]) == 2
    assert "was trained with tokeniser" in capsys.readouterr().err
    assert not (tmp_path / "back/checkpoints").exists()


# Message -> command; words in capitals are paths of the test.
BAD_INPUTS = {
    r"there is no folder .*nowhere": "export nowhere OUT",
    r"there is no folder .*nothing: name a Hugging Face": "import nothing OUT",
    r"lacks config\.json": "import RUN OUT",
    r"holds no moving average": "export RUN OUT --weights ema",
    r"--shard-size 5apples is no size": "export RUN OUT --shard-size 5apples",
    r"--shard-size 0 is no size": "export RUN OUT --shard-size 0",
    r"--logits is a part of --verify": "export RUN OUT --logits",
    r"other\.json has sha256 .* trained with tokeniser": "export RUN OUT --tokenizer OTHER",
    r"text\.json is not a tokenizer\.json": "export RUN OUT --tokenizer TEXT",
    r"already holds something else": "export RUN STORE",
}


@pytest.mark.parametrize(("message", "command"), BAD_INPUTS.items())
def test_bad_input_is_one_sentence_and_exit_code_2(
    run: Path, store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], message: str, command: str
) -> None:
    paths = {"RUN": run, "STORE": store, "OUT": tmp_path / "out"}
    paths |= {"TEXT": tmp_path / "text.json", "OTHER": tmp_path / "other.json"}
    paths["TEXT"].write_text("{}")
    paths["OTHER"].write_text((store / "tokenizer.json").read_text() + "\n")
    assert main([str(paths.get(word, word)) for word in command.split()]) == 2
    said = capsys.readouterr().err
    assert re.search(rf"^convert: .*{message}", said), said
    assert said.count("\n") == 1
    assert not paths["OUT"].exists()
