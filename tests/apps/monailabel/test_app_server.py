"""The app behind a real server, by HTTP, on made-up scans and real ones; the weights are random but fixed."""

import gzip
import hashlib
import json
import shutil
import socket
from concurrent.futures import ThreadPoolExecutor

import nibabel as nib
import numpy as np
import pytest

pytest.importorskip("monailabel", reason="MONAI Label is not installed: .ci/label-test runs these")

from monailabel.client import MONAILabelClient  # noqa: E402

from scripts.apps.monailabel.model_folder import ModelFolder  # noqa: E402
from scripts.data.volumes import load_volume  # noqa: E402
from tests.apps.monailabel.conftest import save_random_weights  # noqa: E402
from tests.apps.monailabel.server import MODEL, NAMES, Server  # noqa: E402
from tests.workflows import run_workflow  # noqa: E402

OBLIQUE = np.array([[0.8, -0.3, 0.1, 5], [0.4, 1.1, 0, -3], [-0.1, 0.2, 2.5, 7], [0, 0, 0, 1]])


@pytest.fixture
def serve(tmp_path, weights, make_app_dir):
    """``serve(studies, align="off", **conf)``: a server, stopped at the end; ``align=None`` leaves it to the app."""
    servers = []

    def start(studies, align="off", **conf):
        app = make_app_dir(tmp_path)
        conf = {"weights": weights, "device": "cpu"} | ({} if align is None else {"align": align}) | conf
        servers.append(Server(app, studies.folder, tmp_path, **conf))
        return servers[-1].wait()

    yield start
    for server in servers:
        server.stop()


def voxels(image):
    return np.asarray(image.dataobj)


def contexts(response):
    assert response.status_code == 200, response.text
    return response.json()["contexts"]


def by_inference_json(folder, weights, image, pairs, labels, **options):
    """What the documented workflow answers for the same scan and contexts."""
    run_workflow(
        "inference",
        dataset_dir=str(image),
        context_images=[str(pair) for pair in pairs],
        context_labels=[str(label) for label in labels],
        checkpoint=str(weights),
        output_dir=str(folder / "plain"),
        mini_context_size=1,
        device="cpu",
        overlays=False,
        **options,
    )
    (path,) = (folder / "plain").glob("*.nii.gz")
    return nib.load(path)


def test_each_saved_annotation_serves_the_next_proposal(tmp_path, serve, make_studies, weights, rewrite):
    studies = make_studies(tmp_path, cases=7, affine=OBLIQUE, size=(16, 12, 14))
    server = serve(studies)
    target, drawn = studies.cases[0], studies.cases[1:]

    assert server.info()["labels"] == []
    nothing = server.infer(target)
    assert nothing.status_code == 409 and "annotate a scan by hand" in nothing.json()["detail"]
    assert server.next_sample().json()["id"] in studies.cases  # with nothing to go by: any

    for count in (1, 2, 4):
        for case in drawn[:count]:
            assert server.save(case, studies.label(case)).status_code == 200
        assert contexts(server.infer(target)) == {"1": drawn[:count], "2": drawn[:count]}
    assert server.info()["labels"] == list(NAMES.values())
    said = server.infer(target).json()
    assert said["label_names"] == {"first": 1, "second": 2} and said["weights"] == "model.pt"
    assert set(said["agreement"]) == {"1", "2"} and not said["warnings"]

    # the answer is inference.json's, voxel by voxel, where the scan lies
    answer = server.answer(target, tmp_path)
    pairs, labels = ([path(case) for case in drawn[:4]] for path in (studies.image, studies.label))
    plain = by_inference_json(tmp_path, weights, studies.image(target), pairs, labels)
    assert len(np.unique(voxels(plain))) > 1 and np.array_equal(voxels(answer), voxels(plain))
    assert np.array_equal(answer.affine, plain.affine) and answer.shape == nib.load(studies.image(target)).shape
    assert answer.get_data_dtype() == plain.get_data_dtype()

    # an annotated scan is not its own example
    again = server.infer(drawn[0])
    assert contexts(again) == {"1": drawn[1:4], "2": drawn[1:4]}
    before = voxels(server.answer(drawn[0], tmp_path))
    rewrite(studies.label(drawn[0]), lambda label: np.where(label > 0, 3 - label, 0).astype(np.uint8))
    assert server.save(drawn[0], studies.label(drawn[0])).status_code == 200
    assert np.array_equal(voxels(server.answer(drawn[0], tmp_path)), before)
    assert not np.array_equal(voxels(server.answer(target, tmp_path)), voxels(answer))  # for others it has changed

    # a label that nobody used before
    rewrite(studies.label(drawn[4]), lambda label: (label + (label == 2)).astype(np.uint8))
    assert server.save(drawn[4], studies.label(drawn[4]), names={1: "first", 3: "third"}).status_code == 200
    assert server.info()["labels"] == ["first", "second", "third"]
    assert contexts(server.infer(target))["3"] == [drawn[4]]
    assert 3 in voxels(server.answer(target, tmp_path))

    # removed again
    gone = server.client.delete("/datastore/label", params={"id": drawn[4], "tag": "final"})
    assert gone.status_code == 200 and server.info()["labels"] == ["first", "second"]


def test_nothing_that_goes_wrong_stops_the_server_or_changes_an_answer(tmp_path, serve, make_studies, write_nifti):
    studies = make_studies(tmp_path, cases=6)
    (tmp_path / "case_00").mkdir()  # a folder where the server runs, of the name of a scan
    (studies.folder / "torn.nii.gz").write_bytes(studies.image("case_05").read_bytes()[:400])
    write_nifti(studies.folder / "blank.nii.gz", np.zeros((16, 16, 16), np.int16))
    server = serve(studies)
    only = server.save("case_01", studies.label("case_01"))
    assert only.status_code == 200
    itself = server.infer("case_01")
    assert itself.status_code == 409 and "no finished annotation" in itself.json()["detail"]
    assert server.save("case_02", studies.label("case_02")).status_code == 200
    good = voxels(server.answer("case_00", tmp_path))
    kept = (studies.folder / "labels" / "final" / "case_01.nii.gz").read_bytes()

    other_shape = write_nifti(tmp_path / "other_shape.nii.gz", np.ones((8, 16, 16), np.uint8))
    elsewhere = write_nifti(tmp_path / "elsewhere.nii.gz", np.ones((16, 16, 16), np.uint8), np.diag([2.0, 2, 2, 1]))
    grey = write_nifti(tmp_path / "grey.nii.gz", np.full((16, 16, 16), 0.5, np.float32))
    torn = tmp_path / "torn_label.nii.gz"
    torn.write_bytes(studies.label("case_01").read_bytes()[:90])
    cases = [
        (server.infer("nobody"), 404, "nobody"),
        (server.infer("torn"), 422, "cannot be read"),
        (server.infer("blank"), 422, "is constant"),
        (server.infer("case_00", result_extension=".png"), 422, "result_extension"),
        (server.infer("case_00", weights="weights_0009.pt"), 404, "weights_0009.pt"),
        (server.infer("case_00", weights="../../secret.pt"), 404, "secret.pt"),
        (server.client.post("/infer/another", params={"image": "case_00"}), 400, "another"),
        (server.save("case_01", other_shape), 422, "differ in shape"),
        (server.save("case_01", elsewhere), 422, "differ in affine"),
        (server.save("case_01", grey), 422, "no label numbers"),
        (server.save("case_01", torn), 422, "cannot be read"),
        (server.save("case_01", studies.label("case_01"), names={1: "second", 2: "first"}), 422, "called 'second'"),
        (server.save("nobody", studies.label("case_01")), 404, "nobody"),
        (server.save("case_03", studies.label("case_03"), tag="../final"), 422, "tag"),
        (server.train(run_sync=True, seconds=-3), 422, "seconds"),
        (server.next_sample("unheard"), 400, "unheard"),
    ]
    for response, status, said in cases:
        assert response.status_code == status and said in response.json()["detail"], response.text

    # one that was put into the folder by hand is left out, and it is said
    shutil.copy(other_shape, studies.folder / "labels" / "final" / "case_03.nii.gz")
    server.client.get("/datastore/")
    for _ in range(40):
        if "case_03" in json.dumps(server.client.get("/datastore/", params={"output": "train"}).json()):
            break
    said = server.infer("case_00").json()
    assert any("case_03" in line and "differ in shape" in line for line in said["warnings"])

    # a client that goes away at once, and one that goes away in the middle
    for wait in (False, True):
        with socket.create_connection(("127.0.0.1", server.port)) as line:
            body = b"params=%7B%7D"
            line.sendall(
                b"POST /infer/neuroverse3d?image=case_04 HTTP/1.1\r\nHost: x\r\n"
                b"Content-Type: application/x-www-form-urlencoded\r\nContent-Length: %d\r\n\r\n" % len(body) + body
            )
            if wait:
                line.settimeout(0.2)
                with pytest.raises(TimeoutError):
                    while line.recv(1):
                        pass
                    raise TimeoutError

    assert server.process.poll() is None
    assert (studies.folder / "labels" / "final" / "case_01.nii.gz").read_bytes() == kept
    assert np.array_equal(voxels(server.answer("case_00", tmp_path)), good)
    usable = {"case_00", "case_04", "case_05"}  # neither the torn nor the blank one, however often
    assert {server.next_sample().json()["id"] for _ in range(6)} == usable


def test_several_clients_at_once_get_the_answers_of_one_by_one(tmp_path, serve, make_studies):
    studies = make_studies(tmp_path, cases=6)
    server = serve(studies)
    for case in studies.cases[3:]:
        assert server.save(case, studies.label(case)).status_code == 200
    one_by_one = {case: server.infer(case, "image").content for case in studies.cases[:5]}
    asked = list(one_by_one) * 2
    with ThreadPoolExecutor(len(asked)) as pool:
        at_once = list(pool.map(lambda case: server.infer(case, "image"), asked))
    assert [response.status_code for response in at_once] == [200] * len(asked)
    for case, response in zip(asked, at_once, strict=True):
        first, second = (nib.Nifti1Image.from_bytes(gzip.decompress(x)) for x in (one_by_one[case], response.content))
        assert np.array_equal(voxels(first), voxels(second)), case


def test_tuning_runs_in_the_background_and_versions_are_used_and_can_be_taken_back(
    tmp_path, serve, make_studies, weights
):
    studies = make_studies(tmp_path, cases=6)
    shipped = hashlib.sha256(weights.read_bytes()).hexdigest()
    server = serve(studies)
    for case in studies.cases[1:]:
        assert server.save(case, studies.label(case)).status_code == 200
    target = studies.cases[0]
    before = voxels(server.answer(target, tmp_path))
    assert server.client.get(f"/model/{MODEL}").status_code == 404  # nothing but the shipped weights

    options = {"seconds": 10, "learning_rate": 1e-9}  # too low to win anything
    assert server.train(**options).status_code == 200
    server.training_begins()
    assert server.train(**options).status_code == 429  # one at a time
    meanwhile = server.infer(target)
    assert meanwhile.status_code == 200 and meanwhile.json()["weights"] == "model.pt"
    ended = server.training_ends()
    assert ended["status"] == "DONE" and '"weights": "model.pt"' in ended["details"][-1], ended
    assert '"kept": false' in ended["details"][-1], ended

    versions = ModelFolder(tmp_path / "app" / "model", weights)  # as a tuning that wins leaves them
    versions.publish(save_random_weights(tmp_path / "other.pt", seed=1))
    assert server.infer(target).json()["weights"] == "weights_0001.pt"
    after = voxels(server.answer(target, tmp_path))
    assert not np.array_equal(after, before)
    assert server.info()["models"][MODEL]["config"]["weights"] == ["current", "shipped", "weights_0001.pt"]
    assert np.array_equal(voxels(server.answer(target, tmp_path, weights="shipped")), before)
    assert np.array_equal(voxels(server.answer(target, tmp_path, weights="weights_0001.pt")), after)

    assert server.train(**options | {"seconds": 600}).status_code == 200
    server.training_begins()
    assert server.client.delete("/train/").status_code == 200
    assert server.training_ends()["status"] == "STOPPED"
    assert server.infer(target).json()["weights"] == "weights_0001.pt"  # nothing came of it

    assert server.train(run_sync=True, start_from="shipped", **options).json()["weights"] == "model.pt"
    versions.publish(tmp_path / "other.pt")
    for left in ("weights_0001.pt", "model.pt"):
        assert server.client.delete(f"/model/{MODEL}").status_code == 200
        assert server.infer(target).json()["weights"] == left
    assert server.client.delete(f"/model/{MODEL}").status_code == 404  # the shipped weights stay
    assert np.array_equal(voxels(server.answer(target, tmp_path)), before)
    assert hashlib.sha256(weights.read_bytes()).hexdigest() == shipped
    set_aside = [path.name for path in (tmp_path / "app" / "model").glob("weights_*.deleted")]
    assert len(set_aside) == 2


def test_the_least_confident_scan_comes_next(tmp_path, serve, make_studies):
    studies = make_studies(tmp_path, cases=6)
    server = serve(studies)
    for case in studies.cases[:2]:
        assert server.save(case, studies.label(case)).status_code == 200
    waiting = studies.cases[2:]
    agreement = {case: np.mean(list(server.infer(case).json()["agreement"].values())) for case in waiting}
    ranked = sorted(waiting, key=agreement.get)
    proposed = [server.next_sample().json() for _ in waiting]
    assert [sample["id"] for sample in proposed] == ranked  # one that was passed over does not come again at once
    assert proposed[0]["agreement"] == pytest.approx(agreement[ranked[0]], abs=1e-3)
    assert server.next_sample("random").json()["id"] in waiting


def test_monai_labels_own_client_gets_what_3d_slicer_asks_for(tmp_path, serve, make_studies):
    studies = make_studies(tmp_path, cases=4, affine=OBLIQUE)
    server = serve(studies)
    client = MONAILabelClient(f"http://127.0.0.1:{server.port}", tmpdir=str(tmp_path))
    for case in studies.cases[1:]:
        said = {"label_info": [{"name": name, "idx": number} for number, name in NAMES.items()]}
        assert client.save_label(case, str(studies.label(case)), params=said)["label"] == case
    assert client.info()["labels"] == ["first", "second"]
    # 3D Slicer always asks for NRRD and 8 bits
    file, said = client.infer(MODEL, studies.cases[0], {"result_extension": ".nrrd", "result_dtype": "uint8"})
    assert file.endswith(".nrrd") and said["label_names"] == {"first": 1, "second": 2}
    as_nrrd, as_nifti = load_volume(file), server.answer(studies.cases[0], tmp_path)
    assert np.array_equal(as_nrrd[0].numpy(), voxels(as_nifti))
    assert np.allclose(as_nrrd.affine.numpy(), as_nifti.affine, atol=1e-4)
    assert client.next_sample("least_confident", {})["id"] == studies.cases[0]


def test_real_scans_get_the_answer_of_inference_json(tmp_path, serve, make_studies, weights, shared_dir):
    source = shared_dir / "data" / "Dataset004_Hippocampus"
    studies = make_studies(tmp_path, cases=1)
    (studies.folder / "case_00.nii.gz").unlink()
    cases = [path.name.removesuffix("_0000.nii.gz") for path in sorted((source / "imagesTr").iterdir())[:5]]
    for case in cases:
        shutil.copy(source / "imagesTr" / f"{case}_0000.nii.gz", studies.image(case))
        shutil.copy(source / "labelsTr" / f"{case}.nii.gz", studies.label(case))
    server = serve(studies, align=None)
    for case in cases[1:]:
        assert server.save(case, studies.label(case)).status_code == 200
    answer = server.answer(cases[0], tmp_path)
    pairs, labels = ([path(case) for case in cases[1:]] for path in (studies.image, studies.label))
    options = {"align": None, "context_selection": "similar"}
    plain = by_inference_json(tmp_path, weights, studies.image(cases[0]), pairs, labels, **options)
    assert voxels(plain).any() and np.array_equal(voxels(answer), voxels(plain))
    assert np.array_equal(answer.affine, plain.affine)
