"""What a Lab keeps is reused when it fits and made anew when it does not."""

import pytest

from dfrot_lab import kept_files, owners, rotations
from dfrot_lab.lab import Lab, LabError, parse_rotation
from dfrot_lab.rotations import RotationError

SMALL = {"model": "tiny:llama", "corpus": "pydoc", "seqlen": 64, "iterations": 3, "clip_steps": 2}


@pytest.fixture
def lab(tmp_path):
    return Lab(**SMALL, folder=tmp_path)


def test_a_measurement_is_made_once(lab, monkeypatch):
    first = lab.perplexity("RH", 1, windows=1)
    monkeypatch.setattr(Lab, "_measure", lambda *a: pytest.fail("measured again"))
    again = Lab(**SMALL, folder=lab.folder)
    assert again.perplexity("RH", 1, windows=1) == first


def test_more_windows_are_added_and_fewer_are_the_first(lab, monkeypatch):
    measured = []
    plain = Lab._measure

    def counted(self, model, missing, found):
        measured.append(missing)
        plain(self, model, missing, found)

    monkeypatch.setattr(Lab, "_measure", counted)
    two = lab.perplexity("RO", 0, keep="massive", windows=2)
    three = lab.perplexity("RO", 0, keep="massive", windows=3)
    assert lab.perplexity("RO", 0, keep="massive", windows=2) == two
    assert measured == [[0, 1], [2]]
    assert three["nll"][:2] == two["nll"] and len(three["nll"]) == 3
    assert [k for k in three["kept"] if k[0] < 2] == two["kept"] and three["kept"]
    alone = Lab(**SMALL, folder=lab.folder / "other")
    assert alone.perplexity("RO", 0, keep="massive", windows=3) == three


def test_windows_before_the_first_are_not_measured(lab, monkeypatch):
    measured = []
    plain = Lab._measure
    monkeypatch.setattr(
        Lab, "_measure", lambda self, *a: (measured.append(a[1]), plain(self, *a))[1]
    )
    last = lab.perplexity("RO", 0, keep="massive", first=2, windows=4)
    every = lab.perplexity("RO", 0, keep="massive", windows=4)
    assert lab.perplexity("RO", 0, keep="massive", first=2, windows=4) == last
    assert measured == [[2, 3], [0, 1]]
    assert last["nll"] == every["nll"][2:] and last["windows"] == 2
    assert last["kept"] == [k for k in every["kept"] if k[0] >= 2] != []
    alone = Lab(**SMALL, folder=lab.folder / "other")
    assert alone.perplexity("RO", 0, keep="massive", windows=4) == every
    for first in (-1, 4):
        with pytest.raises(LabError, match=f"first = {first}: use 0 to 3"):
            lab.perplexity("RO", 0, keep="massive", first=first, windows=4)


def test_no_windows_are_the_whole_split(tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("The quick brown fox jumps over the lazy dog.\n\n" * 20)
    lab = Lab(**SMALL | {"corpus": str(text)}, folder=tmp_path / "r")
    found = lab.perplexity("FP", bits="16-16-16", windows=0)
    assert found["windows"] == len(found["nll"]) == len(lab.evaluation_tokens(0)) > 3


def test_other_parameters_or_code_are_measured_anew(lab, monkeypatch):
    lab.perplexity("RH", 0, windows=1)
    lab.perplexity("RH", 1, windows=1)
    Lab(**SMALL | {"seqlen": 32}, folder=lab.folder).perplexity("RH", 0, windows=1)
    monkeypatch.setattr("dfrot_lab.results.code_digest", lambda *names: "other code")
    Lab(**SMALL, folder=lab.folder).perplexity("RH", 0, windows=1)
    assert len(list((lab.folder / "measurements").iterdir())) == 4


def test_activations_of_another_model_are_collected_anew(lab):
    d = lab.activations.d
    other = Lab(**SMALL | {"model": "tiny:qwen3"}, folder=lab.folder)
    assert other.activations.metadata["key"] != lab.activations.metadata["key"]
    assert other.activations.d == d


def test_a_refined_rotation_is_kept_with_what_it_is(lab):
    r = lab.rotation("DFRot(RO)", 2, gamma=10)
    path = lab.rotation_file("DFRot(RO)", 2, gamma=10)
    kept, about = rotations.load(path, r.shape[-1])
    assert (kept == r).all()
    assert (about["start"], about["seed"], about["gamma"]) == ("RO", 2, "10.0")
    assert len(about["log"]["quantized"]) == 3
    assert lab.rotation_file("DFRot(RO)", 2, gamma=11) != path


def test_no_rotation_and_plain_ones(lab):
    assert lab.rotation("NR") is None
    assert rotations.orthogonality_error(lab.rotation("RH2", 0)) < 1e-12


def test_a_damaged_rotation_file_is_one_clear_error(lab):
    path = lab.rotation_file("DFRot(RH)", 0)
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(RotationError, match="cannot be read"):
        lab.rotation("DFRot(RH)", 0)


@pytest.mark.parametrize(
    ("field", "value"), [("seqlen", 0), ("iterations", -1), ("threads", 0), ("dtype", "int8")]
)
def test_bad_settings_are_named(field, value, tmp_path):
    with pytest.raises(LabError, match=f"{field} = "):
        Lab(**SMALL | {field: value}, folder=tmp_path)


def test_unknown_rotation_lists_the_known_ones():
    with pytest.raises(LabError, match=r"DFRot\(RO\)"):
        parse_rotation("HR")
    assert parse_rotation("DFRot(RO)") == ("DFRot", "RO")


def test_another_rotation_in_the_same_file_is_measured(lab, tmp_path):
    """The model that was built last is not taken for it."""
    path, found = tmp_path / "mine.safetensors", []
    about = owners.of("tiny:llama").about
    for seed in (0, 1):
        rotations.save(path, rotations.random_orthogonal(64, seed), about)
        found.append(lab.perplexity(str(path), windows=1)["ppl"])
    alone = Lab(**SMALL, folder=tmp_path / "other").perplexity(str(path), windows=1)["ppl"]
    assert found[1] == alone != found[0]


@pytest.mark.parametrize("batch", [True, False])
@pytest.mark.parametrize("shared", [True, False])
def test_what_is_added_by_hand_is_not_taken_for_altered(lab, batch, shared):
    """A notebook run by hand is no job that records; a point of a grid has links to what it shares."""
    with kept_files.recording(lab.folder):
        lab.perplexity("RH", 0, windows=1)
    if batch:
        (lab.folder / kept_files.BATCH_LOCK).touch()
    home = lab.folder / "grid" / "point" if shared else lab.folder
    if shared:
        home.mkdir(parents=True)
        for name in ("artefacts", "measurements", ".locks"):
            (home / name).symlink_to(lab.folder / name)
    two = Lab(**SMALL, folder=home).perplexity("RH", 0, windows=2)
    assert set(kept_files.check(lab.folder).values()) == {"recorded"}
    assert kept_files.verify(lab.folder, thorough=True) == []
    assert Lab(**SMALL, folder=lab.folder).perplexity("RH", 0, windows=2) == two


def test_a_file_named_as_a_refined_rotation_is_not_one(lab, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    r = rotations.random_hadamard(64, 3)
    rotations.save("DFRot-mine.safetensors", r, owners.of("tiny:llama").about)
    assert lab.perplexity("DFRot-mine.safetensors", windows=1)["gamma"] is None


def test_what_was_altered_stays_altered_when_it_is_added_to(lab):
    with kept_files.recording(lab.folder):
        lab.perplexity("RH", 0, windows=1)
    (file,) = (lab.folder / "measurements").glob("*.json")
    file.write_text(file.read_text().replace('"nll"', ' "nll"'))
    Lab(**SMALL, folder=lab.folder).perplexity("RH", 0, windows=2)
    name = file.relative_to(lab.folder).as_posix()
    assert kept_files.check(lab.folder)[name] == "altered"


def test_modules_that_are_loaded_keep_their_digest(lab):
    from dfrot_lab import cayley, results

    found = results._source.cache_info().currsize
    results.code_digest(cayley.__name__)
    assert results._source.cache_info().currsize == found  # it was taken when the lab was made
