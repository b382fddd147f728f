"""What ``monailabel start_server --app`` loads: the parts, put together."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

BUNDLE = Path(__file__).resolve().parents[3]
if str(BUNDLE) not in sys.path:  # MONAI Label loads this file by its path, through a link as well
    sys.path.insert(0, str(BUNDLE))

from monailabel.config import settings  # noqa: E402
from monailabel.interfaces.app import MONAILabelApp  # noqa: E402
from monailabel.interfaces.datastore import Datastore, DefaultLabelTag  # noqa: E402
from monailabel.interfaces.tasks.infer_v2 import InferTask  # noqa: E402
from monailabel.interfaces.tasks.strategy import Strategy  # noqa: E402
from monailabel.interfaces.tasks.train import TrainTask  # noqa: E402
from monailabel.utils.others.generic import md5_digest  # noqa: E402

from scripts.apps.monailabel.annotations import FINAL, RECORD, Annotations  # noqa: E402
from scripts.apps.monailabel.checked_datastore import CheckedDatastore  # noqa: E402
from scripts.apps.monailabel.dicom_server import DicomServer  # noqa: E402
from scripts.apps.monailabel.dicomweb_datastore import DicomwebDatastore  # noqa: E402
from scripts.apps.monailabel.guard import protect  # noqa: E402
from scripts.apps.monailabel.infer import InContextSegmentation  # noqa: E402
from scripts.apps.monailabel.model_folder import ModelFolder  # noqa: E402
from scripts.apps.monailabel.predictors import Predictors, app_options  # noqa: E402
from scripts.apps.monailabel.sessions import CheckedSessions  # noqa: E402
from scripts.apps.monailabel.statuses import NotFoundError, clear_statuses  # noqa: E402
from scripts.apps.monailabel.strategy import LeastConfident, RandomReadable  # noqa: E402
from scripts.apps.monailabel.train import Tuning  # noqa: E402
from scripts.apps.monailabel.uploads import check_file, check_tag, is_received, leads_elsewhere  # noqa: E402

MODEL = "neuroverse3d"


class InContextApp(MONAILabelApp):
    """Proposes segmentations from the annotations that are finished, and may be tuned on them.

    Args:
        app_dir: folder of this run of the app: weights in ``model``, logs in ``logs``.
        studies: folder of scans, or a DICOMweb address.
        conf: ``weights`` (a file; ``models/model.pt`` of the bundle by default), and options of
            ``configs/inference.json`` by name, see :func:`~scripts.apps.monailabel.predictors.app_options`.

    Raises:
        FileNotFoundError: no weights.
        ValueError: an option that cannot be set here, or not to this value.
    """

    def __init__(self, app_dir: str, studies: str, conf: dict[str, str]) -> None:
        self.model_folder = ModelFolder(
            Path(app_dir) / "model", Path(conf.get("weights") or BUNDLE / "models" / "model.pt")
        )
        self.options = app_options(conf)
        super().__init__(
            app_dir,
            studies,
            conf,
            name="Neuroverse3D",
            description="In-context segmentation from the finished annotations. Research use only.",
        )

    def init_datastore(self) -> Datastore:
        """A folder, or a DICOMweb server; XNAT and DSA are MONAI Label's own."""
        if self.studies.startswith(("http://", "https://")):
            if settings.MONAI_LABEL_DATASTORE.lower() in ("xnat", "dsa"):
                return super().init_datastore()
            self.studies = self.studies.rstrip("/ ")
            folder = settings.MONAI_LABEL_DICOMWEB_CACHE_PATH.strip() or Path.home() / ".cache" / "neuroverse3d"
            return DicomwebDatastore(
                DicomServer.at(self.studies),
                settings.MONAI_LABEL_DICOMWEB_SEARCH_FILTER,
                Path(folder, f"dicomweb_{md5_digest(self.studies)}"),
                settings.MONAI_LABEL_DICOMWEB_CACHE_EXPIRY,
            )
        return CheckedDatastore(
            self.studies,
            extensions=settings.MONAI_LABEL_DATASTORE_FILE_EXT,
            auto_reload=settings.MONAI_LABEL_DATASTORE_AUTO_RELOAD,
            read_only=settings.MONAI_LABEL_DATASTORE_READ_ONLY,
        )

    def init_infers(self) -> dict[str, InferTask]:
        """The one model; with it what all tasks share."""
        self.annotations = Annotations(self.datastore(), self.model_folder.folder / RECORD)
        self.predictors = Predictors(self.annotations, self.model_folder, self.options)
        return {MODEL: InContextSegmentation(self.annotations, self.predictors, self.model_folder)}

    def init_trainers(self) -> dict[str, TrainTask]:
        """Tuning."""
        return {MODEL: Tuning(self.annotations, self.model_folder, self.options)}

    def init_strategies(self) -> dict[str, Strategy]:
        """What to annotate next."""
        return {"least_confident": LeastConfident(self.predictors), "random": RandomReadable()}

    def info(self) -> dict[str, Any]:
        """As the base class, of the studies as they are now."""
        self.datastore().status()  # a DICOMweb server is asked, before the labels are listed
        return super().info()

    def infer(self, request: dict[str, Any], datastore: Datastore | None = None) -> dict[str, Any]:
        """A proposal for a scan of the studies, or one that was sent for this; errors as HTTP statuses."""
        with clear_statuses():
            store, image = datastore or self.datastore(), request.get("image")
            tag = request.get("label_tag") or DefaultLabelTag.ORIGINAL.value
            check_tag(tag)
            if request.get("save_label") and tag == FINAL:
                raise ValueError(f"a proposal is not saved as {FINAL!r}: look at it, and submit it as an annotation")
            path, known = self._scan(store, image)
            # saved here: the base class looks for the id among the files where the server runs
            result = super().infer(request | {"image": path, "save_label": False}, store)
            if known and request.get("save_label"):
                said = {"model": request["model"], "params": result["params"]}
                result["label"] = store.save_label(image, result["file"], tag, said)
            return result

    def infer_wsi(self, request: dict[str, Any], datastore: Datastore | None = None) -> dict[str, Any]:
        """There are no whole slide images here."""
        with clear_statuses():
            raise NotFoundError("no whole slide images")

    def _scan(self, store: Datastore, image: Any) -> tuple[str, bool]:
        """Path of a scan, and whether it is one of the studies.

        Raises:
            NotFoundError: it is neither that nor one that was sent.
            ValueError: what was sent is no scan.
        """
        if isinstance(image, str):
            sent = (session.image for session in (self.sessions() or {}).values())
            if is_received(image) or image in sent:
                check_file(image)
                return image, False
            if not leads_elsewhere(image) and (path := store.get_image_uri(image)):
                return path, True
        raise NotFoundError(f"no image {image!r} among the studies")

    def bundle_path(self, model: str) -> str:
        """What background processes import from: never the ``bundle_path`` that a client sends."""
        return str(BUNDLE)

    def on_init_complete(self) -> None:
        """The server has started."""
        from monailabel.app import app as server  # imports the whole server, which background processes do without

        protect(server)
        super().on_init_complete()

    def _load_sessions(self, load: bool = False) -> CheckedSessions | None:
        if not load:
            return None
        return CheckedSessions(settings.MONAI_LABEL_SESSION_PATH, settings.MONAI_LABEL_SESSION_EXPIRY)

    def train(self, request: dict[str, Any]) -> dict[str, Any]:
        """Tune; errors as HTTP statuses."""
        with clear_statuses():
            return super().train(request)

    def next_sample(self, request: dict[str, Any]) -> dict[str, Any]:
        """What to annotate next; errors as HTTP statuses."""
        with clear_statuses():
            return super().next_sample(request)
