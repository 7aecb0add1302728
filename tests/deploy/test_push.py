"""A model alone, and what is uploaded: to a hub on this machine."""

from collections.abc import Callable
from pathlib import Path
from typing import Any
import pytest
import transformers
import serve
from ftcore import files as disk
from ftcore.deploy.bundle import bundle, push
from ftcore.errors import CheckpointError, ModelError
from tests.deploy.test_bundle import AUTO, FULL, GIVEN, LORA, golden, logits, theirs
from tests.serve.conftest import Asked

Trained = Callable[..., Path]
PLAIN = {"config.json", "model.safetensors", "manifest.json", "tokenizer.json",
         "tokenizer_config.json"}

@pytest.mark.parametrize(("kind", "method"), [("sft", LORA), ("sft", FULL), ("classify", LORA)])
def test_a_merged_model_is_that_of_the_bundle(
    kind: str, method: tuple, trained: Trained, capsys: pytest.CaptureFixture[str]
) -> None:
    run = trained(kind, *method, "--env.precision", "bf16")
    assert serve.main(["merge", str(run), "merged"]) == 0
    assert "merged: opened, and says what the run says" in capsys.readouterr().out
    bundle(run, GIVEN)
    names = {path.name for path in Path("merged").iterdir()}
    assert names == PLAIN | ({"generation_config.json"} if kind == "sft" else set())
    assert set(disk.verify_folder(Path("merged"))) == names - {"manifest.json"}
    for name in names - {"manifest.json"}:
        assert Path("merged", name).read_bytes() == (GIVEN / name).read_bytes()
    model = AUTO[kind].from_pretrained("merged").float()
    asked = Asked("merged")
    assert transformers.AutoTokenizer.from_pretrained("merged")("one")["input_ids"]
    for probe in golden(GIVEN):
        ours = logits(asked.model.float(), probe["ids"])
        assert (theirs(model, probe["ids"]) - ours).abs().max() < 1e-4

@pytest.mark.parametrize("verb", ["bundle", "merge"])
def test_all_of_a_folder_is_uploaded(verb: str, trained: Trained, hub: Any) -> None:
    assert serve.main([verb, str(trained("sft", *LORA)), str(GIVEN)]) == 0
    (GIVEN / ".env").write_text("secret")
    assert push(GIVEN, "owner/name").endswith("/owner/name")
    (made,) = hub.made
    assert (made["name"], made["organization"]) == ("name", "owner")
    assert made.get("visibility") == "private" or made["private"]  # as the library's version says
    whole = {path.name: path.read_bytes() for path in GIVEN.iterdir() if path.name != ".env"}
    assert hub.files == whole

def test_what_is_damaged_is_not_uploaded(trained: Trained, hub: Any) -> None:
    bundle(trained("sft"), GIVEN)
    (GIVEN / "more.txt").write_text("x")
    with pytest.raises(CheckpointError, match=r"more.txt is not in manifest.json"):
        push(GIVEN, "owner/name")
    (GIVEN / "more.txt").unlink()
    path = GIVEN / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    with pytest.raises(CheckpointError, match=r"model.safetensors was altered"):
        push(GIVEN, "owner/name")
    with pytest.raises(ModelError, match=r"config.json: cannot be read .* serve.py bundle RUN DIR"):
        push(Path("none"), "owner/name")
    assert not hub.made and not hub.files

@pytest.mark.parametrize("token", [None, "wrong"])
def test_a_hub_that_refuses_is_one_message(
    token: str | None, trained: Trained, hub: Any, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str]
) -> None:
    bundle(trained("sft"), GIVEN)
    monkeypatch.setattr("huggingface_hub.utils._headers.get_token", lambda: token)
    for name in ("owner/name", "a name/of no kind"):
        assert serve.main(["push", str(GIVEN), name]) == 2
        error = capsys.readouterr().err
        assert error.startswith(f"error: {name}: the hub did not take {GIVEN} (")
        assert "set HF_TOKEN" in error and error.count("\n") == 1
    assert not hub.files

@pytest.mark.parametrize("words", [
    ["merge", "run"], ["merge", "run", "out", "--keep-adapter"], ["push", "out"],
    ["bundle", "--keep-adapter", "run"], ["bundle", "run", "out", "--keep"]])
def test_other_words_are_told_the_form(
    words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert serve.main(words) == 2
    assert f"error: {words[0]} " in (said := capsys.readouterr().err) and "DIR" in said
