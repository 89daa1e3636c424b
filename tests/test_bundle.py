"""The bundle: the same bytes every time, complete, and scripts that do their work with numpy and ONNX Runtime alone."""

from __future__ import annotations

import ast
import json
import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import numpy_helper

from bundle_runs import LABELS, here, small_run
from conftest import CommandLine
from edgecompress.deploy.bundle import DEVICE_MODULES, Bundle, write_bundle
from edgecompress.errors import RunError
from edgecompress.run_directory import RunDirectory, sha256_of, write_json

PACKAGE = Path(__file__).resolve().parent.parent / "edgecompress"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> RunDirectory:
    return small_run(tmp_path_factory.mktemp("runs") / "run")


@pytest.fixture(scope="module")
def bundle(run: RunDirectory, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return write_bundle(run, here(), exported=run.export, output=tmp_path_factory.mktemp("bundles"))


def bundled(run: RunDirectory, output: Path, **how: Any) -> Bundle:
    return write_bundle(run, here(), exported=run.export, output=output, **how)


def script(folder: Path, *words: str, **how: Any) -> subprocess.CompletedProcess[str]:
    """Run a script of a bundle from another folder, where the package itself is not to be found."""
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    command = [sys.executable, str(folder / words[0]), *words[1:]]
    return subprocess.run(
        command, cwd=folder.parent, env=environment, capture_output=True, text=True, timeout=120, **how
    )


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# ---- what is written


def test_the_same_run_gives_the_same_bytes(run: RunDirectory, bundle: Bundle, tmp_path: Path) -> None:
    copy = RunDirectory(shutil.copytree(run.path, tmp_path / "moved"))
    for path in copy.path.rglob("*"):
        os.utime(path, (1, 1))
    again = bundled(copy, tmp_path / "elsewhere")
    assert again.archive.read_bytes() == bundle.archive.read_bytes()
    assert contents(again.folder) == contents(bundle.folder)
    assert bundled(copy, tmp_path / "elsewhere").archive.read_bytes() == bundle.archive.read_bytes()  # in its own place


def test_the_archive_holds_the_folder_and_nothing_of_this_machine(bundle: Bundle) -> None:
    with tarfile.open(bundle.archive) as tar:
        members = tar.getmembers()
        stored = {
            m.name.removeprefix("tiny-here/"): tar.extractfile(m).read()  # type: ignore[union-attr]
            for m in members
            if m.isfile()
        }
    assert stored == contents(bundle.folder)
    assert {(m.uid, m.gid, m.uname, m.gname, m.mtime) for m in members} == {(0, 0, "", "", 315_532_800)}
    assert {m.name for m in members if m.mode & 0o111 and m.isfile()} == {"tiny-here/infer.py", "tiny-here/bench.py"}
    assert bundle.archive.read_bytes()[4:8] == b"\0\0\0\0"  # gzip's time
    assert str(bundle.folder.parent).encode() not in b"".join(stored.values())


def test_the_manifest_names_every_file_and_how_to_call_the_models(bundle: Bundle) -> None:
    manifest = json.loads((bundle.folder / "manifest.json").read_text())
    files = contents(bundle.folder)
    assert manifest["files"].keys() == files.keys() - {"manifest.json"}
    for name, facts in manifest["files"].items():
        assert facts == {"sha256": sha256_of(bundle.folder / name), "size_bytes": len(files[name])}
    for model in manifest["models"].values():
        session = onnxruntime.InferenceSession(bundle.folder / model["file"], providers=["CPUExecutionProvider"])
        assert model["input"] == {"name": "input", "dtype": "uint8", "shape": session.get_inputs()[0].shape}
        assert model["output"]["name"] == session.get_outputs()[0].name == "logits"
    test = manifest["self_test"]
    assert len(test["samples"]) == 9
    for index, sample in enumerate(test["samples"]):
        pixels = np.load(bundle.folder / sample["image"])
        assert pixels.dtype == np.uint8
        for name, model in manifest["models"].items():
            session = onnxruntime.InferenceSession(bundle.folder / model["file"], providers=["CPUExecutionProvider"])
            logits = session.run(None, {"input": pixels[None]})[0][0]
            expected = np.load(bundle.folder / test["models"][name]["logits"])[index]
            assert np.abs(logits - expected).max() <= test["models"][name]["max_abs_diff"]
            best = sample["expected"][name][0]
            assert best["class"] == int(expected.argmax())
            assert best["logit"] == pytest.approx(float(expected.max()))
    assert {tuple(np.load(bundle.folder / s["image"]).shape) for s in test["samples"]} == {(8, 8, 3), (12, 16, 3)}


def test_int8_tolerance_is_twice_what_int8_itself_loses(bundle: Bundle) -> None:
    test = bundle.manifest["self_test"]
    logits = {name: np.load(bundle.folder / rule["logits"]).astype(float) for name, rule in test["models"].items()}
    error = logits["int8"] - logits["fp32"]
    assert test["models"]["int8"]["max_abs_diff"] == pytest.approx(2 * np.abs(error).max())
    assert test["models"]["int8"]["rms_diff"] == pytest.approx(2 * np.sqrt((error**2).mean()))
    assert test["models"]["fp32"]["max_abs_diff"] == pytest.approx(1e-3 * np.abs(logits["fp32"]).max())


def test_labels_stand_one_a_line(bundle: Bundle) -> None:
    lines = (bundle.folder / "labels.txt").read_text(encoding="utf-8").splitlines()
    assert lines == ["cat", "dog", r"a\nb", *LABELS[3:]]


def test_float_alone_is_enough(tmp_path: Path) -> None:
    made = bundled(small_run(tmp_path / "run", int8=False), tmp_path / "out")
    assert made.manifest["default_model"] == "fp32"
    assert script(made.folder, "infer.py", "--self-test").returncode == 0


# ---- the scripts


def test_self_test_passes_and_leaves_the_folder_as_it_was(bundle: Bundle) -> None:
    before = contents(bundle.folder)
    done = script(bundle.folder, "infer.py", "--self-test")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("passed") == 2
    assert contents(bundle.folder) == before


def test_without_preprocessing_the_models_read_normalized_floats(run: RunDirectory, tmp_path: Path) -> None:
    made = bundled(run, tmp_path, preprocessing_inside=False)
    assert made.manifest["models"]["int8"]["input"] == {"name": "input", "dtype": "float32", "shape": ["N", 3, 8, 8]}
    assert (made.folder / "model.onnx").read_bytes() == (run.export / "model.onnx").read_bytes()
    done = script(made.folder, "infer.py", "--self-test")
    assert done.returncode == 0, done.stdout + done.stderr
    sample = made.manifest["self_test"]["samples"][0]
    named = script(made.folder, "infer.py", str(made.folder / sample["image"]), "--json", "--model", "fp32")
    assert json.loads(named.stdout)["top"][0]["class"] == sample["expected"]["fp32"][0]["class"]
    oblong = tmp_path / "oblong.npy"
    np.save(oblong, np.zeros((20, 11, 3), np.uint8))
    assert script(made.folder, "infer.py", str(oblong)).returncode == 0  # resized by Pillow


@pytest.mark.parametrize("name", ["model.onnx", "model.int8.onnx"])
def test_self_test_fails_loudly_where_the_answers_differ(bundle: Bundle, tmp_path: Path, name: str) -> None:
    """One convolution gives four times what it should, as a kernel that reads a scale wrongly would."""
    folder = Path(shutil.copytree(bundle.folder, tmp_path / "broken"))
    model = onnx.load(folder / name)
    wanted = "stem.weight" if name == "model.onnx" else "stem.weight_scale"
    (tensor,) = [t for t in model.graph.initializer if t.name == wanted]
    tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor) * np.float32(4), tensor.name))
    onnx.save(model, folder / name)
    done = script(folder, "infer.py", "--self-test")
    assert done.returncode == 1
    assert "self-test FAILED" in done.stderr
    assert "FAILED" in done.stdout
    other = "int8" if name == "model.onnx" else "fp32"
    assert script(folder, "infer.py", "--self-test", "--model", other).returncode == 0


def test_infer_classifies_arrays_and_pictures(bundle: Bundle, tmp_path: Path) -> None:
    sample = bundle.manifest["self_test"]["samples"][0]
    for path in (sample["image"], sample["picture"]):
        done = script(bundle.folder, "infer.py", str(bundle.folder / path), "--json", "--top", "2")
        answer = json.loads(done.stdout)
        assert answer["model"] == "int8"
        assert len(answer["top"]) == 2
        assert answer["top"][0]["class"] == sample["expected"]["int8"][0]["class"]
    for words, needle in (
        ([str(tmp_path / "none.npy")], "none.npy"),
        ([__file__], "cannot be decoded"),
        ([str(bundle.folder / sample["image"]), "--model", "fp16"], "--model fp16: the bundle holds fp32, int8"),
    ):
        done = script(bundle.folder, "infer.py", *words)
        assert (done.returncode, done.stdout) == (2, "")
        assert needle in done.stderr
        assert "Traceback" not in done.stderr


def test_bench_prints_a_table_and_writes_every_latency(bundle: Bundle, tmp_path: Path) -> None:
    output = tmp_path / "bench.json"
    done = script(bundle.folder, "bench.py", "--seconds", "0.2", "--output", str(output))
    assert done.returncode == 0, done.stderr
    assert "latency, median" in done.stdout
    results = json.loads(output.read_text())
    assert results["models"]["int8"]["sha256"] == sha256_of(bundle.folder / "model.int8.onnx")
    assert results["versions"]["onnxruntime"] == onnxruntime.__version__
    assert len(results["latency"]["windows_ms"]["fp32"]) >= 5
    assert results["fresh"]["int8"]["load_ms"] > 0
    assert results["machine"]["cores"]


def test_scripts_speak_python_3_9_and_bring_all_that_they_import(bundle: Bundle) -> None:
    scripts = [bundle.folder / "infer.py", bundle.folder / "bench.py", *(bundle.folder / "edgecompress").rglob("*.py")]
    assert len(scripts) == 2 + len(DEVICE_MODULES)
    for path in scripts:
        tree = ast.parse(path.read_text(encoding="utf-8"), feature_version=(3, 9))
        own = path.relative_to(bundle.folder).as_posix()
        source = PACKAGE / "device" / path.name if path.parent == bundle.folder else PACKAGE.parent / own
        assert path.read_bytes() == source.read_bytes()
        for node in ast.walk(tree):
            if isinstance(node, ast.Call):  # syntax that 3.9 reads, and functions that it has not
                assert "strict" not in {keyword.arg for keyword in node.keywords}, f"{path.name}:{node.lineno}"
    program = (
        "import sys; sys.path.insert(0, sys.argv[1]); import bench, infer, edgecompress.measure.measure_worker, json; "
        "others = {name.partition('.')[0] for name in sys.modules}; "
        "print(sorted(others & {'torch', 'onnx', 'pydantic', 'yaml', 'rich', 'PIL', 'psutil'})); "
        "print([m.__file__ for n, m in sys.modules.items() if n.startswith('edgecompress')])"
    )
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, "-B", "-c", program, str(bundle.folder)],
        capture_output=True,
        text=True,
        env=environment,
        cwd=bundle.folder.parent,
        check=True,
    )
    heavy, files = done.stdout.splitlines()
    assert heavy == "[]"
    assert all(name.startswith(str(bundle.folder)) for name in ast.literal_eval(files))


# ---- what is said and refused


def gate(passed: bool) -> dict[str, Any]:
    return {"gate": "parity", "step": "export", "target": None, "passed": passed, "sentence": "Parity is *broken*."}


def test_what_speaks_against_shipping_is_said_first(command_line: CommandLine, tmp_path: Path) -> None:
    run = small_run(tmp_path / "run", gates=[gate(passed=False)])
    write_json(tmp_path / "here.json", here().model_dump(mode="json"))
    words = ("bundle", run.path, "--target", tmp_path / "here.json", "--output", tmp_path / "out", "--quiet")
    answer = command_line(*words)
    assert answer.exit_code == 3
    assert answer.stdout.splitlines()[0] == "DO NOT SHIP: a gate was missed: Parity is *broken*."
    readme = (tmp_path / "out" / "tiny-here" / "README.md").read_text()
    assert readme.splitlines()[2] == r"**DO NOT SHIP: a gate was missed: Parity is \*broken\*.**"
    assert command_line(*words, "--no-gate").exit_code == 0
    document = json.loads(command_line(*words, "--json").stdout)
    assert document["folder"] == str(tmp_path / "out" / "tiny-here")
    assert command_line("verify", run.path).exit_code == 0


@pytest.mark.parametrize("verdict", ["hold", "inconclusive", "ship"])
def test_the_verdict_is_the_profiles(tmp_path: Path, verdict: str) -> None:
    run = small_run(tmp_path / "run")
    missed = ["Too slow."] if verdict == "hold" else []
    profile = {"verdict": verdict, "measured": True, "reasons": ["Because."], "missed": missed}
    write_json(run.profile_path("here"), profile)
    made = bundled(run, tmp_path / "out")
    readme = (made.folder / "README.md").read_text()
    assert f"**{verdict}**" in readme
    expected = {
        "hold": "DO NOT SHIP: the verdict for here is hold: Too slow.",
        "inconclusive": "The verdict for here is inconclusive.",
        "ship": None,
    }[verdict]
    assert made.caution == expected
    assert ("DO NOT SHIP" in readme) is (verdict == "hold")


def test_a_profile_of_other_files_is_no_verdict(tmp_path: Path) -> None:
    run = small_run(tmp_path / "run")
    profile = {"verdict": "ship", "measured": True, "reasons": ["Because."], "missed": []}
    write_json(run.profile_path("here"), profile | {"files": run.exported_files("here")})
    assert bundled(run, tmp_path / "out").caution is None
    write_json(run.profile_path("here"), profile | {"files": {"model.onnx": "another"}})
    made = bundled(run, tmp_path / "out")
    assert made.manifest["verdict"]["verdict"] is None
    words = "Not profiled for here, so there is no verdict yet. The profile for here is of other files"
    assert (made.caution or "").startswith(words)


def test_nothing_of_others_is_overwritten(run: RunDirectory, tmp_path: Path) -> None:
    made = bundled(run, tmp_path)
    (made.folder / "mine.txt").write_text("mine")
    with pytest.raises(RunError, match=r"mine\.txt: is no file of the bundle"):
        bundled(run, tmp_path)
    (made.folder / "mine.txt").unlink()
    other = small_run(tmp_path / "other")
    other.update_manifest(lambda m: m.update(started_at="2026-02-02T00:00:00+00:00"))
    with pytest.raises(RunError, match="is no bundle of this run"):
        bundled(other, tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match="choose another --output"):
        bundled(run, tmp_path / "file")
    with pytest.raises(RunError, match="nothing exported for target here"):
        write_bundle(run, here(), exported=run.path / "export" / "rpi9", output=tmp_path / "none")
    assert not list(tmp_path.glob(".*"))


# ---- on bare ground


@pytest.mark.slow
def test_an_environment_of_numpy_and_onnxruntime_is_enough(bundle: Bundle, tmp_path: Path) -> None:
    subprocess.run([sys.executable, "-m", "venv", tmp_path / "venv"], check=True, timeout=120)
    python = tmp_path / "venv" / "bin" / "python"
    wanted = [f"numpy=={np.__version__}", f"onnxruntime=={onnxruntime.__version__}"]
    installed = subprocess.run(
        [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--retries", "1", *wanted],
        capture_output=True,
        text=True,
        timeout=400,
    )
    if installed.returncode != 0:
        pytest.skip(f"no package index answers: {installed.stderr.strip().splitlines()[-1]}")
    environment = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}

    def there(*words: str | Path) -> subprocess.CompletedProcess[str]:
        command = [python, "-W", "error", *words]
        return subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=200)

    absent = there("-c", "import importlib.util as u; print([n for n in ('torch', 'PIL', 'onnx') if u.find_spec(n)])")
    assert absent.stdout.strip() == "[]"
    tested = there(bundle.folder / "infer.py", "--self-test")
    assert tested.returncode == 0, tested.stdout + tested.stderr
    assert there(bundle.folder / "infer.py", bundle.folder / "samples" / "0.npy").returncode == 0
    picture = there(bundle.folder / "infer.py", bundle.folder / "samples" / "0.png")
    assert picture.returncode == 2
    assert "Pillow" in picture.stderr
    measured = there(bundle.folder / "bench.py", "--seconds", "0.5", "--output", "bench.json")
    assert measured.returncode == 0, measured.stderr
    assert json.loads((tmp_path / "bench.json").read_text())["latency"]["windows_ms"]["int8"]


def _onnxruntime_cxx() -> tuple[Path, Path] | str:
    """Headers of the C++ API and the library of the installed wheel; or why there are none."""
    folders = [os.environ.get("ONNXRUNTIME_ROOT", ""), "/usr", "/usr/local"]
    places = [Path(folder) / "include" / inner for folder in folders if folder for inner in ("", "onnxruntime")]
    headers = next((place for place in places if (place / "onnxruntime_cxx_api.h").is_file()), None)
    libraries = sorted((Path(onnxruntime.__file__).parent / "capi").glob("libonnxruntime.so.*"))
    tools = [tool for tool in ("cmake", "c++") if shutil.which(tool) is None]
    if tools:
        return f"{' and '.join(tools)} not installed"
    if headers is None:
        return "no headers of ONNX Runtime's C++ API (Debian: libonnxruntime-dev, or set ONNXRUNTIME_ROOT)"
    return (headers, libraries[0]) if libraries else "the onnxruntime package ships no shared library"


@pytest.mark.slow
@pytest.mark.parametrize("inside", [True, False])
def test_the_cpp_example_gives_the_expected_answers(run: RunDirectory, tmp_path: Path, inside: bool) -> None:
    found = _onnxruntime_cxx()
    if isinstance(found, str):
        pytest.skip(found)
    headers, library = found
    root = tmp_path / "onnxruntime"
    (root / "lib").mkdir(parents=True)
    (root / "include").symlink_to(headers)
    for name in ("libonnxruntime.so", "libonnxruntime.so.1"):
        (root / "lib" / name).symlink_to(library)
    made = bundled(run, tmp_path / "out", preprocessing_inside=inside)
    build = tmp_path / "build"
    configure = ["cmake", "-S", made.folder / "cpp", "-B", build, f"-DONNXRUNTIME_ROOT={root}"]
    subprocess.run([*configure, "-DCMAKE_CXX_FLAGS=-Wall -Wextra -Werror"], check=True, capture_output=True)
    subprocess.run(["cmake", "--build", build], check=True, capture_output=True)
    environment = os.environ | {"LD_LIBRARY_PATH": str(root / "lib")}
    for sample in made.manifest["self_test"]["samples"]:
        for name in ("fp32", "int8"):
            command = [build / "classify", made.folder, made.folder / sample["image"], name]
            done = subprocess.run(command, env=environment, capture_output=True, text=True)
            assert done.returncode == 0, done.stderr
            best = sample["expected"][name][0]
            logit = float(done.stdout.splitlines()[0].rpartition("logit ")[2].rstrip(")"))
            assert f"(class {best['class']}, " in done.stdout.splitlines()[0]
            assert logit == pytest.approx(best["logit"], abs=made.manifest["self_test"]["models"][name]["max_abs_diff"])
    done = subprocess.run([build / "classify", made.folder, __file__], env=environment, capture_output=True, text=True)
    assert done.returncode == 1
    assert "is no .npy file" in done.stderr
