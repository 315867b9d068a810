"""prepare_data.sh, run for real beside a stand-in data.py; file:// stands for the network."""
import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
import zipfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "prepare_data.sh"
TRAIN = {"MoNuSeg 2018 Training Data/Tissue Images/a.tif": b"image " * 999,
         "MoNuSeg 2018 Training Data/Annotations/a.xml": b"<Annotations/>"}
TEST = {"MoNuSegTestData/b.tif": b"IMAGE " * 999, "MoNuSegTestData/b.xml": b"<Annotations/>"}
BCSS = {"BCSS/train/c.png": b"tile", "BCSS/train_mask/c.png": b"mask"}
STAND_IN = """\
import itertools, json, pathlib, sys
folders = itertools.takewhile(lambda a: a[0] != "-", sys.argv[sys.argv.index("--from") + 1:])
files = sorted(p.name for f in folders for p in pathlib.Path(f).rglob("*.[tp][in][fg]"))
pathlib.Path("ran.json").write_text(json.dumps({"argv": sys.argv[1:], "files": files}))
"""

pytestmark = [pytest.mark.usefixtures("posix"),
              *(pytest.mark.skipif(not shutil.which(tool), reason=f"needs {tool}")
                for tool in ("bash", "curl"))]


def archive(path, entries):
    with zipfile.ZipFile(path, "w") as z:
        for name, content in entries.items():
            z.writestr(name, content)
    return path


def sha256(path):
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


class Place:
    """A folder "re po" with the script and the stand-in, and one "far" that serves archives."""

    def __init__(self, tmp):
        self.repo, self.far, self.mine = tmp / "re po", tmp / "far", tmp / "my files"
        for folder in (self.repo, self.far, self.mine):
            folder.mkdir()
        shutil.copy(SCRIPT, self.repo)
        (self.repo / "data.py").write_text(STAND_IN)
        self.raw = self.repo / "data" / "raw"
        self.train = archive(self.far / "train.zip", TRAIN)
        self.test = archive(self.far / "test.zip", TEST)
        self.bcss = archive(self.far / "bcss.zip", BCSS)
        self.swin = self.far / "swin.pth"
        self.swin.write_bytes(b"weights" * 999)
        self.env = {**os.environ, "PYTHON": sys.executable}
        for name in ("monuseg_train", "monuseg_test", "bcss", "swin"):
            self.serve(name, getattr(self, name.split("_")[-1]))

    def serve(self, name, path, checksum=None):
        self.env[f"{name.upper()}_URL"] = path.as_uri()
        self.env[f"{name.upper()}_SHA256"] = checksum or ("" if name == "bcss" else sha256(path))

    def run(self, *words, cwd=None, status=0):
        """Runs the script; returns what data.py saw, or the one sentence of a failure."""
        (self.repo / "ran.json").unlink(missing_ok=True)
        done = subprocess.run(["bash", self.repo / "prepare_data.sh", *map(str, words)],
                              cwd=cwd or self.repo, env=self.env, capture_output=True, text=True)
        assert done.returncode == status, done.stdout + done.stderr
        if not status:
            ran = self.repo / "ran.json"
            return json.loads(ran.read_text()) if ran.exists() else done.stdout
        assert not (self.repo / "ran.json").exists() and "Traceback" not in done.stderr
        said = [line for line in done.stderr.splitlines() if not line.startswith("curl: ")]
        assert len(said) == 1, done.stderr
        return said[0]


@pytest.fixture
def place(tmp_path):
    return Place(tmp_path)


def test_monuseg_is_fetched_checked_unpacked_and_prepared(place):
    ran = place.run("monuseg", "--later-images", "--raster", "exact")
    assert ran["argv"] == ["prepare", "monuseg", "--from", "data/raw/monuseg",
                           "--later-images", "--raster", "exact"]
    assert ran["files"] == ["a.tif", "b.tif"]


@pytest.mark.skipif(not shutil.which("flock"), reason="needs flock")
@pytest.mark.parametrize("words", [[], ["--from"]])
def test_two_at_once_do_not_unpack_into_each_other(place, words):
    words = [*words, place.bcss] if words else []
    place.run("bcss", *words)
    shutil.rmtree(place.raw)
    (place.raw / "bcss").mkdir(parents=True)
    with subprocess.Popen(["flock", place.raw / "bcss", "sleep", "99"],
                          start_new_session=True) as other:
        while not subprocess.run(["flock", "-n", place.raw / "bcss", "true"]).returncode:
            time.sleep(0.01)
        assert "another prepare_data.sh is at work in" in place.run("bcss512", *words, status=2)
        os.killpg(other.pid, signal.SIGKILL)
    assert not [*(place.raw / "bcss").iterdir()]


@pytest.mark.parametrize("name", ["bcss", "bcss512"])
def test_one_archive_serves_both_bcss_sets(place, name):
    ran = place.run(name, "--data-root", "else where")
    root = str(place.repo / "else where")
    assert ran["argv"] == ["prepare", name, "--from", root + "/raw/bcss", "--data-root", root]
    assert ran["files"] == ["c.png", "c.png"] and not place.raw.exists()


def test_weights_need_no_python(place):
    place.env["PYTHON"] = "/nowhere/python"
    place.run("weights")
    file = place.repo / "data/weights/swin_tiny_patch4_window7_224.pth"
    assert file.read_bytes() == place.swin.read_bytes()
    file.write_bytes(b"cut short")
    place.run("weights")
    assert file.read_bytes() == place.swin.read_bytes()
    place.swin.unlink()
    place.run("weights")  # a file that is there is not fetched again


def test_second_run_fetches_and_unpacks_nothing(place):
    place.run("monuseg")
    shutil.rmtree(place.far)
    marked = next(place.raw.rglob("a.tif"))
    marked.write_bytes(b"mark")
    place.run("monuseg")
    assert marked.read_bytes() == b"mark"
    for zip in place.raw.rglob("*.zip"):
        zip.unlink()
    assert place.run("monuseg")["files"] == ["a.tif", "b.tif"]
    assert marked.read_bytes() == b"mark"


def test_interrupted_download_goes_on_where_it_stopped(place):
    whole = place.bcss.read_bytes()
    half = len(whole) // 2
    checksum = sha256(place.bcss)
    place.bcss.write_bytes(b"?" * half + whole[half:])  # only its second half is any good
    place.serve("bcss", place.bcss, checksum)
    (place.raw / "bcss").mkdir(parents=True)
    (place.raw / "bcss/archive.zip.part").write_bytes(whole[:half])
    assert place.run("bcss")["files"] == ["c.png", "c.png"]


class Stalling(BaseHTTPRequestHandler):
    """Serves `server.content`: 200 bytes and then nothing for 20 s; but all that is left of it."""

    def do_GET(self):
        content, start = self.server.content, int((self.headers["Range"] or "bytes=0-")[6:-1])
        self.server.starts.append(start)
        self.send_response(206 if start else 200)
        self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        self.send_header("Content-Length", str(len(content) - start))
        self.end_headers()
        self.wfile.write(content[start:] if start else content[:200])
        time.sleep(0 if start else 20)


def test_stalled_download_ends_and_goes_on_where_it_stopped(place):
    server, curl = ThreadingHTTPServer(("127.0.0.1", 0), Stalling), place.far / "curl"
    server.content, server.starts = place.bcss.read_bytes(), []
    threading.Thread(target=server.serve_forever, daemon=True).start()
    curl.write_text(f"""#!/usr/bin/env bash
        exec '{shutil.which("curl")}' --noproxy '*' "${{@/#60/1}}"  # seconds for minutes""")
    curl.chmod(0o755)
    place.env |= {"BCSS_URL": f"http://127.0.0.1:{server.server_port}/x",
                  "PATH": f"{place.far}:{os.environ['PATH']}"}
    start = time.time()
    assert place.run("bcss")["files"] == ["c.png", "c.png"]
    assert server.starts == [0, 200] and time.time() - start < 15
    server.shutdown()


@pytest.mark.parametrize("known", [True, False])
def test_part_file_that_is_complete_already_is_taken(place, known):
    gone = place.far / "gone.zip"
    place.serve("bcss", gone, sha256(place.bcss) if known else None)
    said = place.run("bcss", status=2)
    assert gone.as_uri() in said and "run this again to resume" in said
    shutil.copy(place.bcss, place.raw / "bcss/archive.zip.part")
    assert place.run("bcss")["files"] == ["c.png", "c.png"]


@pytest.mark.parametrize("name", ["monuseg", "bcss"])
def test_web_page_instead_of_an_archive_is_recognised(place, name):
    page = place.far / "quota"
    page.write_text("<!DOCTYPE html><html>Quota exceeded</html>" + " " * 9999)
    place.serve("monuseg_test" if name == "monuseg" else "bcss", page, "0" * 64)
    said = place.run(name, status=2)
    assert "web page" in said and page.as_uri() in said
    assert f"./prepare_data.sh {name} --from 'data/raw/{name}'" in said
    assert not list(place.raw.rglob("*.part"))
    # What the sentence says to do works, also with the archive that did come.
    good = place.test if name == "monuseg" else place.bcss
    shutil.copy(good, place.raw / name / "by hand.zip")
    assert len(place.run(name, "--from", f"data/raw/{name}")["files"]) == 2


@pytest.mark.parametrize("name, part", [("monuseg", "monuseg_train"), ("weights", "swin")])
def test_wrong_checksum_leaves_nothing_behind(place, name, part):
    bad = place.far / "bad"
    bad.write_bytes(place.train.read_bytes() + b"\0")
    place.serve(part, bad, "f" * 64)
    said = place.run(name, status=2)
    assert "f" * 64 in said and sha256(bad) in said
    assert not [p for p in (place.repo / "data").rglob("*") if p.is_file()]


@pytest.mark.parametrize("damage", ["cut short", "flipped byte"])
@pytest.mark.parametrize("how", ["fetched", "given"])
def test_damaged_archive_is_named_and_not_half_unpacked(place, damage, how):
    content = bytearray(place.train.read_bytes())
    content[len(content) // 4] ^= 255
    content = content[:-30] if damage == "cut short" else content
    bad = place.mine / "bad.zip"
    bad.write_bytes(content)
    if how == "fetched":
        place.serve("monuseg_train", bad)  # the checksum is right: it is the source that is bad
        said = place.run("monuseg", status=2)
        assert "MoNuSeg 2018 Training Data.zip" in said
    else:
        assert str(bad) in place.run("monuseg", "--from", bad, status=2)
    assert not list(place.raw.rglob("*.tif"))


def test_hostile_archive_stays_inside(place):
    link = zipfile.ZipInfo("BCSS/link")
    link.external_attr = 0o120777 << 16
    hostile = {"../../../../up.png": b"", f"{place.repo.parent}/root.png": b"", link: b"/etc"}
    archive(place.bcss, {**hostile, **BCSS})
    before = {p for p in place.repo.parent.rglob("*")}
    place.run("bcss")
    made = {p for p in place.repo.parent.rglob("*")} - before
    assert all(p.is_relative_to(place.repo / "data") or p.name == "ran.json" for p in made)
    assert {"up.png", "root.png", "link"} <= {p.name for p in made}
    assert not any(p.is_symlink() for p in made)


def test_from_folders_are_used_in_place_from_anywhere(place):
    shutil.unpack_archive(place.train, place.mine)
    shutil.unpack_archive(place.test, place.far / "more")
    ran = place.run("monuseg", "--from", "my files", cwd=place.mine.parent)
    assert ran["argv"] == ["prepare", "monuseg", "--from", str(place.mine)]
    ran = place.run("monuseg", "--raster", "exact", "--from", ".", "../far/more", "--later-images",
                    cwd=place.mine)
    assert ran["argv"][-3:] == ["--raster", "exact", "--later-images"]
    assert ran["files"] == ["a.tif", "b.tif"]
    assert not place.raw.exists()


def test_from_finds_images_of_upper_case_suffix(place):
    (place.mine / "a.TIF").touch()
    assert place.run("monuseg", "--from", place.mine)["argv"][3:] == [str(place.mine)]


def test_from_follows_links(place):
    shutil.unpack_archive(place.train, place.far / "deep")
    (place.mine / "inside").symlink_to(place.far / "deep")
    for link, target in ("top", place.far / "deep"), ("to mine", place.mine):
        (place.repo / link).symlink_to(target)
        assert place.run("monuseg", "--from", link)["argv"][3:] == [str(place.repo / link)]


def test_from_archives_are_unpacked_once_and_not_into_the_users_folder(place):
    shutil.copy(place.train, place.mine / "my train.zip")
    shutil.copy(place.test, place.mine / "my test.ZIP")
    archive(place.mine / "holiday.zip", {"photo.jpg": b""})
    ran = place.run("monuseg", "--from", place.mine)
    assert ran["argv"] == ["prepare", "monuseg", "--from", "data/raw/monuseg"]
    assert ran["files"] == ["a.tif", "b.tif"] and not list(place.raw.rglob("photo.jpg"))
    next(place.raw.rglob("a.tif")).write_bytes(b"mark")
    assert place.run("monuseg", "--from", place.mine) == ran
    assert next(place.raw.rglob("a.tif")).read_bytes() == b"mark"
    assert len(list(place.mine.iterdir())) == 3


def test_from_takes_archives_and_folders_together_but_no_image_twice(place):
    shutil.unpack_archive(place.train, place.mine)
    shutil.copy(place.train, place.mine)
    ran = place.run("monuseg", "--from", place.mine, place.test)
    assert ran["argv"][3:] == [str(place.mine), "data/raw/monuseg"]
    assert ran["files"] == ["a.tif", "b.tif"]
    other = archive(place.mine / "test.zip", {"MoNuSegTestData/another.tif": b""})
    ran = place.run("monuseg", "--from", other, place.test)  # one name, two archives
    assert ran["files"] == ["another.tif", "b.tif"]


def test_half_unpacked_folder_is_not_taken_for_a_whole_one(place):
    half = place.raw / "monuseg.part"
    half.mkdir(parents=True)
    (half / "torn.tif").touch()
    assert place.run("monuseg")["files"] == ["a.tif", "b.tif"] and not half.exists()


@pytest.mark.parametrize("words, said", [
    (["monuseg", "--from", "no where"], "no where"), (["monuseg", "--from"], "--from needs"),
    (["monuseg", "--from", "."], "no *.tif"), (["monuseg", "--from=x"], "without the ="),
    (["weights", "--from", "x"], "weights takes no --from"),
    (["bcss", "--raster", "exact"], "--raster is for monuseg"),
    (["monuseg", "--raster"], "--raster needs a value"),
    (["monuseg", "--data-root"], "--data-root needs a value"),
    (["monuseg", "--raster", "exatc"], "--raster is paper or exact, not exatc"),
    (["monuseg", "--ratser", "exact"], "no flag is called --ratser"), (["mnist"], "'mnist'"),
    (["monuseg-exact"], "./prepare_data.sh monuseg --raster exact")])
def test_a_wrong_command_line_gets_one_sentence(place, words, said):
    assert said in place.run(*words, cwd=place.mine, status=2)


@pytest.mark.parametrize("words", [[], ["--help"], ["bcss", "--help"]])
def test_help_shows_commands_and_fetches_nothing(place, words):
    said = place.run(*words)
    assert "./prepare_data.sh monuseg --from DIR" in said and "set -e" not in said
    assert not (place.repo / "data").exists()


def test_readme_links_to_the_archives_that_are_fetched():
    ids = re.findall(r"\$\{drive\}(\w+)", SCRIPT.read_text("utf-8"))
    readme = SCRIPT.with_name("README.md").read_text("utf-8")
    assert len(ids) == 2 and all(f"&id={name})" in readme for name in ids)
