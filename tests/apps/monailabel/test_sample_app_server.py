"""MONAI Label's own ``monaibundle`` sample app, unmodified, with this bundle in its model folder."""

import shutil
import sys
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from scipy.spatial.transform import Rotation

pytest.importorskip("monailabel", reason="MONAI Label is not installed: .ci/label-test runs these")

from tests.apps.monailabel.server import MODEL, Server  # noqa: E402
from tests.workflows import run_workflow  # noqa: E402


def test_the_sample_app_runs_the_bundle_with_a_context_dir(tmp_path, make_dataset, make_studies, weights):
    app = tmp_path / "monaibundle"
    shutil.copytree(Path(sys.prefix) / "monailabel" / "sample-apps" / "monaibundle", app)
    bundle = app / "model" / MODEL
    for part in ("configs", "scripts"):
        shutil.copytree(part, bundle / part)
    (bundle / "models").mkdir()
    shutil.copy(weights, bundle / "models" / "model.pt")
    oblique = np.eye(4)  # MONAI Label writes orthogonal axes only
    oblique[:3, :3] = Rotation.from_euler("xyz", (20, -10, 15), degrees=True).as_matrix() * (0.8, 1.1, 2.5)
    oblique[:3, 3] = (5, -3, 7)
    studies = make_studies(tmp_path, cases=2, affine=oblique)
    context_dir = make_dataset(tmp_path, name="Dataset002_Contexts", cases=3, affine=oblique)

    server = Server(app, studies.folder, tmp_path, models=MODEL, zoo_source="ngc")
    try:
        server.wait()
        assert server.info()["models"][MODEL]["config"]["context_dir"] == ""
        for case in studies.cases:
            answer = server.answer(case, tmp_path, context_dir=str(context_dir))
            run_workflow(
                "inference",
                dataset_dir=str(studies.image(case)),
                context_dir=str(context_dir),
                checkpoint=str(weights),
                output_dir=str(tmp_path / "plain" / case),
                device="cpu",
                align=None,
                overlays=False,
            )
            plain = nib.load(tmp_path / "plain" / case / f"{case}.nii.gz")
            assert np.asarray(plain.dataobj).any()
            assert np.array_equal(np.asarray(answer.dataobj), np.asarray(plain.dataobj))
            assert np.allclose(answer.affine, plain.affine, atol=1e-4)
        # without contexts there is nothing to go by; it is MONAI Label that answers this with a bare 500
        assert server.infer(studies.cases[0]).status_code == 500
        assert server.answer(studies.cases[0], tmp_path, context_dir=str(context_dir)).shape == (16, 16, 16)
        assert "give --context_dir" in server.log.read_text()
    finally:
        server.stop()
