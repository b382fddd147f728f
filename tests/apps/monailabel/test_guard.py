"""The doors of the server, one by one, in this process: names, files, sessions, and what errors tell."""

import base64
import io
import json
import os
import shutil
import tarfile
import threading
import time
from http.server import BaseHTTPRequestHandler, HTTPServer
from urllib.parse import quote

import nibabel as nib
import numpy as np
import pytest

pytest.importorskip("monailabel", reason="MONAI Label is not installed: .ci/label-test runs these")

import jwt  # noqa: E402
from cryptography.hazmat.primitives import serialization  # noqa: E402
from cryptography.hazmat.primitives.asymmetric import rsa  # noqa: E402
from fastapi import HTTPException  # noqa: E402
from fastapi.testclient import TestClient  # noqa: E402
from monailabel.config import settings  # noqa: E402

from scripts.apps.monailabel.guard import without_folders  # noqa: E402
from tests.apps.monailabel.server import MODEL, Server  # noqa: E402

CODE = '$__import__("os").environ.__setitem__("CODE_RAN", "1")'
NAMES = (CODE, "@dataset_dir", "%seed", "a@#b", "x@##y", "a::b", "=1+1")
CLIMBING = ("..", "../x", "a/../../x", "/etc/passwd", "..\\x", "%2e%2e/x", "a\0b", "x/..")


@pytest.fixture
def door(tmp_path, weights, make_app_dir, make_studies, monkeypatch):
    """A client of the server, and its studies of four cases; nothing else is in ``tmp_path`` but ``secret.nii.gz``."""
    import monailabel.app

    studies = make_studies(tmp_path, cases=4)
    monkeypatch.setattr(settings, "MONAI_LABEL_APP_DIR", str(make_app_dir(tmp_path)))
    monkeypatch.setattr(settings, "MONAI_LABEL_STUDIES", str(studies.folder))
    monkeypatch.setattr(settings, "MONAI_LABEL_APP_CONF", {"weights": str(weights), "device": "cpu", "align": "off"})
    monkeypatch.setattr(settings, "MONAI_LABEL_SESSION_PATH", str(tmp_path / "sessions"))
    monkeypatch.setattr(settings, "MONAI_LABEL_DATASTORE_AUTO_RELOAD", False)
    (tmp_path / "secret.nii.gz").write_bytes(studies.image("case_03").read_bytes())
    with TestClient(monailabel.app.app, raise_server_exceptions=False) as client:
        client.studies = studies
        yield client


def save(door, image, file, tag="final", name="label.nii.gz", **said):
    files = {"label": (name, file.read_bytes() if hasattr(file, "read_bytes") else file)}
    return door.put(
        "/datastore/label", params={"image": image, "tag": tag}, data={"params": json.dumps(said)}, files=files
    )


def upload(door, image, content, name="scan.nii.gz"):
    return door.put("/datastore/image", params={"image": image}, files={"file": (name, content)})


def infer(door, image, /, **params):
    return door.post(f"/infer/{MODEL}", params={"image": image, "output": "json"}, data={"params": json.dumps(params)})


def everything(folder):
    """Files and their contents, but for the server's own notes."""
    own = ("app", "sessions", ".lock", "datastore_v2.json")
    files = [path for path in folder.rglob("*") if path.is_file() and not {*path.relative_to(folder).parts} & {*own}]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def test_no_tag_or_name_leads_out_of_the_studies(door, tmp_path):
    studies, before = door.studies, everything(tmp_path)
    scan, label = studies.image("case_00").read_bytes(), studies.label("case_01")
    for tag in ("..", ".", "../final", "final/..", "/tmp", "a\0", "a\\b", " ", "..final", quote("../x"), "x" * 300):
        assert save(door, "case_01", label, tag=tag).status_code == 422, tag
    for name in (*CLIMBING, ".hidden", "a/b", "x" * 300, "-rf", "a\nb"):
        assert upload(door, name, scan).status_code == 422, name
        assert infer(door, name).status_code == 404, name
        assert save(door, name, label).status_code == 404, name
        for path in ("/datastore/image", "/datastore/label"):
            asked = {"image": name, "label": name, "tag": "final", "id": name}
            assert door.get(path, params=asked).status_code == 404, (path, name)
            assert door.delete(path, params=asked).status_code == 404, (path, name)
            assert door.put(f"{path}/info", params=asked, data={"info": "{}"}).status_code == 404, (path, name)
    assert everything(tmp_path) == before

    assert save(door, "case_02", studies.label("case_02")).status_code == 200
    before = everything(tmp_path)
    for tag in ("..", "../..", 5, ["final"], {"$x": 1}, "final"):  # nor does a proposal replace an annotation
        assert infer(door, "case_00", label_tag=tag, save_label=True).status_code == 422, tag
    assert everything(tmp_path) == before
    assert infer(door, "case_00", save_label=True, label_tag="draft").status_code == 200
    assert (studies.folder / "labels" / "draft" / "case_00.nii.gz").is_file()


def test_signs_of_configurations_are_letters_of_names(door, monkeypatch, tmp_path):
    monkeypatch.delenv("CODE_RAN", raising=False)
    studies = door.studies
    names = dict(zip(NAMES, (*studies.cases, *studies.cases), strict=False))
    for name, case in names.items():
        scan = nib.load(studies.image(case))
        changed = nib.Nifti1Image(np.asanyarray(scan.dataobj) + 7 * NAMES.index(name), scan.affine)
        assert upload(door, name, changed.to_bytes(), "scan.nii").json() == {"image": name}
        said = {"label_info": [{"name": CODE, "idx": 1}, {"name": "@seed", "idx": 2}]}
        assert save(door, name, studies.label(case), **said).status_code == 200
    assert door.get("/info/").json()["labels"] == [CODE, "@seed"]
    for name in (*NAMES[:2], NAMES[4], "case_00"):
        found = infer(door, name)
        assert found.status_code == 200 and set(found.json()["contexts"]["1"]) <= set(NAMES) - {name}, found.text
    settings = {"seconds": 2, "checkpoint": CODE, "output_dir": CODE, "seed": CODE, CODE: CODE}
    trained = door.post(f"/train/{MODEL}", params={"run_sync": True}, json=settings)
    assert trained.status_code == 200 and trained.json()["annotations"] == len(NAMES), trained.text
    for name in NAMES[:2]:
        assert door.delete("/datastore/image", params={"id": name}).status_code == 200
    assert sorted(door.get("/datastore/", params={"output": "all"}).json()["objects"]) == sorted(
        {*NAMES[2:], *studies.cases}
    )
    assert "CODE_RAN" not in os.environ


def test_scans_are_those_of_the_studies_and_those_that_were_sent(door, tmp_path):
    studies = door.studies
    assert save(door, "case_02", studies.label("case_02")).status_code == 200
    secret = str(tmp_path / "secret.nii.gz")
    texts = []
    for name in (secret, str(tmp_path / "nothing.nii.gz"), "../secret.nii.gz", str(studies.image("case_00"))):
        for response in (infer(door, name), infer(door, "case_00", image=name), infer(door, "", image=name)):
            assert response.status_code in (404, 500) and str(tmp_path) not in response.text, response.text
            texts.append((name, response.status_code))
        for way in ("wsi", "wsi_v2"):
            assert door.post(f"/infer/{way}/{MODEL}", params={"image": name}, json={}).status_code == 404
    assert all(status == 404 for name, status in texts if name) or {s for _, s in texts} <= {404, 500}
    # what is there and what is not are told apart by nothing
    there, absent = infer(door, secret), infer(door, str(tmp_path / "nothing.nii.gz"))
    assert there.text.replace("secret", "nothing") == absent.text
    assert infer(door, "case_00", image=["case_00"]).status_code == 404

    sent = door.post(
        f"/infer/{MODEL}",
        params={"output": "json"},
        data={"params": "{}"},
        files={"file": ("mine.nii.gz", studies.image("case_00").read_bytes())},
    )
    assert sent.status_code == 200 and sent.json()["contexts"]["1"] == ["case_02"]


def test_links_out_of_the_studies_are_passed_over(door, tmp_path):
    studies = door.studies
    (studies.folder / "out.nii.gz").symlink_to(tmp_path / "secret.nii.gz")
    (studies.folder / "within.nii.gz").symlink_to(studies.image("case_00"))
    (studies.folder / "dangling.nii.gz").symlink_to("nowhere")
    for name in (b"not utf-8 \xff.nii.gz", b"line\nbreak.nii.gz", b"a..b.nii.gz"):
        shutil.copy(studies.image("case_02"), os.path.join(os.fsencode(studies.folder), name))
    (studies.folder / "folder.nii.gz").mkdir()
    outside = tmp_path / "outside"
    outside.mkdir()
    (studies.folder / "labels" / "away").symlink_to(outside)
    (studies.folder / "labels" / "final" / "case_03.nii.gz").symlink_to(tmp_path / "secret.nii.gz")
    instance = _instance()
    instance.datastore().refresh()
    assert sorted(instance.datastore().list_images()) == ["a..b", "case_00", "case_01", "case_02", "case_03", "within"]
    assert len(door.get("/datastore/", params={"output": "all"}).json()["objects"]) == 6
    assert door.get("/datastore/image", params={"image": "a..b"}).status_code == 200
    assert door.get("/datastore/image", params={"image": "out"}).status_code == 404
    assert door.get("/datastore/image", params={"image": "within"}).status_code == 200
    assert door.get("/datastore/label", params={"label": "case_03", "tag": "final"}).status_code == 404
    secret = (tmp_path / "secret.nii.gz").read_bytes()
    assert save(door, "case_01", studies.label("case_01"), tag="away").status_code == 422 and not any(outside.iterdir())
    assert save(door, "case_03", studies.label("case_03")).status_code == 422
    assert upload(door, "dangling", secret).status_code == 409
    assert (tmp_path / "secret.nii.gz").read_bytes() == secret and instance.datastore().datalist() == []


def test_uploads_are_scans_and_replace_nothing(door, tmp_path):
    studies, before = door.studies, everything(tmp_path)
    scan, label = studies.image("case_00").read_bytes(), studies.label("case_00").read_bytes()
    detached = (
        f"NRRD0005\ntype: uint8\ndimension: 3\nsizes: 16 16 16\nencoding: raw\ndata file: {tmp_path}/raw\n\n".encode()
    )
    (tmp_path / "raw").write_bytes(bytes(range(256)) * 16)
    before = everything(tmp_path)
    blank = nib.Nifti1Image(np.zeros((4, 4, 4), np.int16), np.eye(4)).to_bytes()
    for name, content in {
        "x.py": b"raise SystemExit",
        "x.nii.gz": b"raise SystemExit",
        "x.nii": blank,
        "x.nii.gz.py": scan,
        "x": scan,
        "x.html": b"<script>",
        "a\0.nii.gz": b"",
        "torn.nii.gz": scan[:300],
        "x.nrrd": detached,
        "y.nrrd": b"\xff\xfe",
        f"x.{'y' * 300}.nii.gz": scan,
    }.items():
        assert upload(door, "new", content, name).status_code == 422, name
        for tag in ("final", "original"):
            assert save(door, "case_00", content, tag=tag, name=name).status_code == 422, (name, tag)
        sent = door.post(f"/infer/{MODEL}", data={"params": "{}"}, files={"file": (name, content)})
        assert sent.status_code in (409, 422) and str(tmp_path) not in sent.text, name
    for params in ("[1]", "5", "no JSON", '"$x"'):
        files = {"file": ("scan.nii.gz", scan)}
        asked = door.put("/datastore/image", params={"image": "new"}, data={"params": params}, files=files)
        assert asked.status_code in (422, 500), params  # MONAI Label's own code fails at the first two
    assert upload(door, "case_01", scan).status_code == 409
    assert upload(door, "case_01", nib.load(studies.image("case_00")).to_bytes(), "scan.nii").status_code == 409
    assert everything(tmp_path) == before
    assert upload(door, "new", scan, "my.scan.v2.nii.gz").json() == {"image": "new"}
    assert (studies.folder / "new.nii.gz").read_bytes() == scan
    assert save(door, "new", label).status_code == 200


def test_what_a_client_says_of_a_scan_cannot_break_the_server(door):
    studies = door.studies
    assert save(door, "case_01", studies.label("case_01"), label_info=5).status_code == 200
    for info in (
        {"strategy": {"least_confident": "x"}},
        {"strategy": {"least_confident": {"ts": []}}},
    ):
        said = {"info": json.dumps(info)}
        assert door.put("/datastore/image/info", params={"image": "case_00"}, data=said).status_code == 200
        assert door.post("/activelearning/least_confident", json={}).status_code == 200
    for info in ("5", "[]", "{", '{"strategy": 5}'):
        asked = door.put("/datastore/image/info", params={"image": "case_00"}, data={"info": info})
        assert asked.status_code in (422, 500), info
        assert door.get("/datastore/image/info", params={"image": "case_00"}).json()["strategy"]["least_confident"]
    assert door.post("/activelearning/least_confident", json={"candidates": [1]}).status_code == 422
    assert infer(door, "case_00", result_extension=5).status_code == 422
    assert infer(door, "case_00", weights={"a": 1}).status_code == 404
    for name, value in {"seconds": [], "learning_rate": {}}.items():
        asked = door.post(f"/train/{MODEL}", params={"run_sync": True}, json={name: value})
        assert asked.status_code == 422 and name in asked.json()["detail"], asked.text
    assert door.get("/info/").status_code == 200


def test_sessions_hold_one_scan_each(door, tmp_path):
    studies, scan = door.studies, door.studies.image("case_00").read_bytes()
    assert save(door, "case_02", studies.label("case_02")).status_code == 200
    climbing = io.BytesIO()
    with tarfile.open(fileobj=climbing, mode="w") as archive:
        link = tarfile.TarInfo("link.nii.gz")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        archive.addfile(link)
        out = tarfile.TarInfo("../../out.txt")
        out.size = 1
        archive.addfile(out, io.BytesIO(b"x"))
    for name, content, asked in (
        ("x.tar", climbing.getvalue(), {"uncompress": True}),
        ("sitecustomize.py", b"raise SystemExit", {}),
        ("..", scan, {}),
        ("x.nii.gz", b"text", {}),
        ("meta.info", b"{}", {}),
    ):
        assert door.put("/session/", params=asked, files={"files": (name, content)}).status_code == 422, name
    two = [("files", ("a.nii.gz", scan)), ("files", ("b.nii.gz", scan))]
    assert door.put("/session/", files=two).status_code == 422
    assert not list(tmp_path.rglob("out.txt")) and not list((tmp_path / "sessions").glob("*"))

    (tmp_path / "planted").mkdir()
    meta = {"name": "planted", "image": "/etc/passwd", "expiry": 60, "last_access_ts": int(time.time())}
    (tmp_path / "planted" / "meta.info").write_text(json.dumps(meta))
    for name in ("../planted", str(tmp_path / "planted"), "%2e%2e", "%2e%2e%2fplanted", "x"):
        assert door.get(f"/session/{name}", params={"image": True}).status_code in (404, 405), name
        assert door.delete(f"/session/{name}").status_code in (404, 405), name
        asked = door.post(f"/infer/{MODEL}", params={"session_id": name, "output": "json"}, data={"params": "{}"})
        assert asked.status_code == 404, name
    assert (tmp_path / "planted" / "meta.info").is_file()

    made = door.put("/session/", files={"files": ("a.nii.gz", scan)}).json()
    asked = door.post(
        f"/infer/{MODEL}", params={"session_id": made["session_id"], "output": "json"}, data={"params": "{}"}
    )
    assert asked.status_code == 200 and asked.json()["contexts"]["1"] == ["case_02"]
    assert door.delete(f"/session/{made['session_id']}").status_code == 200


def test_other_doors(door, tmp_path):
    assert door.post("/reload").status_code == 404
    assert door.put(f"/model/{MODEL}", files={"file": ("w.pt", b"x")}).status_code == 405
    for model in ("%2e%2e", "another", "%2e%2e%2fx", "a%00b"):
        for ask in (door.get, door.delete):
            assert ask(f"/model/{model}").status_code in (404, 405), model
        assert door.get(f"/model/info/{model}").status_code == 404, model
    for path in ("/proxy/dicom/studies", "/proxy/dicom/wado/%2e%2e/x", "/ohif/%2e%2e", "/ohif/%252e%252e/x"):
        response = door.get(path)
        assert response.status_code == 404 and str(tmp_path) not in response.text, path
    missing = door.get("/logs/")
    assert missing.status_code == 404 and str(tmp_path) not in missing.text
    assert door.get("/datastore/dataset").status_code == 404
    assert door.head("/datastore/image", params={"image": "case_00", "check_sum": "X:1"}).status_code == 422
    foreign = door.get("/info/", headers={"Origin": "http://elsewhere.example"})
    assert foreign.status_code == 403 and "access-control-allow-origin" not in foreign.headers
    own = door.get("/info/", headers={"Origin": "http://testserver"})
    assert own.status_code == 200 and "access-control-allow-origin" not in own.headers


def test_a_background_process_imports_nothing_that_a_client_names(door, tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(
        "monailabel.utils.async_tasks.task.run_background_task", lambda request, method: seen.append(request) or {}
    )
    for path in (f"/train/{MODEL}", "/train/another", f"/batch/infer/{MODEL}"):
        assert door.post(path, json={"bundle_path": str(tmp_path)}).status_code == 200
    assert len(seen) == 3 and str(tmp_path) not in {request["bundle_path"] for request in seen}


def test_errors_name_files_and_no_folders():
    assert without_folders("/srv/data/a.nii.gz cannot be read") == "a.nii.gz cannot be read"
    assert without_folders(f"{settings.MONAI_LABEL_STUDIES or '/studies'}/x y.nii: 3 mm/s") == "x y.nii: 3 mm/s"
    assert without_folders("no image '/etc/passwd' at http://127.0.0.1/a/b") == (
        "no image 'passwd' at http://127.0.0.1/a/b"
    )


@pytest.fixture(scope="module")
def realm():
    """An RSA key, and the address of a realm that publishes it as Keycloak does."""
    key = rsa.generate_private_key(public_exponent=65537, key_size=2048)
    public = key.public_key().public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)

    class Realm(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200)
            self.end_headers()
            self.wfile.write(json.dumps({"public_key": base64.b64encode(public).decode()}).encode())

        def log_message(self, *_):
            pass

    server = HTTPServer(("127.0.0.1", 0), Realm)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield key, f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


def test_tokens_of_the_realm_open_the_doors_and_no_others(realm, monkeypatch):
    import monailabel.app
    from monailabel.endpoints.user import auth

    from scripts.apps.monailabel.guard import protect

    key, address = realm
    protect(monailabel.app.app)
    monkeypatch.setattr(settings, "MONAI_LABEL_AUTH_ENABLE", True)
    monkeypatch.setattr(settings, "MONAI_LABEL_AUTH_REALM_URI", address)
    now = int(time.time())
    said = {"preferred_username": "ann", "realm_access": {"roles": ["monailabel-user"]}, "exp": now + 60}
    user = auth.from_token(jwt.encode(said, key, "RS256"))
    assert user.username == "ann" and user.roles == ["monailabel-user"]
    other = rsa.generate_private_key(public_exponent=65537, key_size=2048)
    public = auth.get_public_key(address)
    for wrong in (
        jwt.encode(said, other, "RS256"),
        jwt.encode(said | {"exp": now - 60}, key, "RS256"),
        jwt.encode({name: value for name, value in said.items() if name != "exp"}, key, "RS256"),
        jwt.encode(said, None, "none"),
        _signed_with_the_public_key(said, public),
        "nonsense",
    ):
        with pytest.raises(jwt.InvalidTokenError):
            auth.from_token(wrong)
        with pytest.raises(HTTPException) as refused:
            _run(auth.get_current_user(wrong))
        assert refused.value.status_code == 401


def test_a_server_with_authentication(realm, tmp_path, make_studies, make_app_dir, weights, monkeypatch):
    key, address = realm
    monkeypatch.setenv("MONAI_LABEL_AUTH_ENABLE", "true")
    monkeypatch.setenv("MONAI_LABEL_AUTH_REALM_URI", address)
    studies = make_studies(tmp_path, cases=2)
    server = Server(make_app_dir(tmp_path), studies.folder, tmp_path, weights=weights, device="cpu")
    try:
        server.wait()

        def ask(method, path, *roles, **options):
            said = {"preferred_username": "ann", "realm_access": {"roles": roles}, "exp": int(time.time()) + 60}
            token = {"Authorization": f"Bearer {jwt.encode(said, key, 'RS256')}"} if roles else {}
            return server.client.request(method, path, headers=token, **options).status_code

        doors = [
            ("GET", "/info/"),
            ("GET", "/datastore/"),
            ("GET", "/datastore/image?image=case_00"),
            ("GET", "/logs/"),
            ("PUT", "/datastore/label?image=case_00"),
            ("POST", f"/infer/{MODEL}?image=case_00"),
            ("GET", "/train/"),
            ("POST", f"/train/{MODEL}"),
            ("GET", f"/model/{MODEL}"),
            ("GET", "/session/x"),
            ("GET", "/ohif/"),
        ]
        for door in doors:
            assert ask(*door) == 401, door
        assert ask("GET", "/info/", "monailabel-user") == 200 and ask("GET", "/info/", "stranger") == 403
        assert ask("GET", "/logs/", "monailabel-user") == 403 and ask("GET", "/logs/", "monailabel-admin") == 200
        assert ask("DELETE", "/datastore/image?id=case_00", "monailabel-annotator") == 403
        assert ask("POST", "/reload") == 404
    finally:
        server.stop()


def _signed_with_the_public_key(said, public):
    """The classic forgery: HMAC with the key that everybody has."""
    import hashlib
    import hmac

    def part(content):
        return base64.urlsafe_b64encode(content).rstrip(b"=")

    text = part(json.dumps({"alg": "HS256", "typ": "JWT"}).encode()) + b"." + part(json.dumps(said).encode())
    return (text + b"." + part(hmac.digest(public.encode(), text, hashlib.sha256))).decode()


def _run(coroutine):
    import asyncio

    return asyncio.run(coroutine)


def _instance():
    from monailabel.interfaces.utils.app import app_instance

    return app_instance()
