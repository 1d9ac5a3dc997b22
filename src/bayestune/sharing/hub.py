"""Uploads a posterior to the Hub whole: both halves, its calibration, its card."""

import json
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import replace
from os import PathLike
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi
from huggingface_hub.utils import HFValidationError, validate_repo_id
from safetensors import SafetensorError, safe_open

from bayestune.adapters import CONFIG, DETAILS, FILES, TENSORS, WEIGHTS
from bayestune.decisions import FILE_NAME as CALIBRATION
from bayestune.errors import Refusal
from bayestune.evaluation import Record
from bayestune.posteriors import artefact_folder, posterior_digest
from bayestune.session import REPORT_FILE, PredictionOptions, details_if_any
from bayestune.sharing.card import CARD, card_digest, make_card
from bayestune.sharing.known import Known

_UNFINISHED = ".unfinished"
_RUN = "run.json"
# An upload deletes these in the repository first, for it may not have all that an earlier one had.
_OURS = tuple(f"*{name}" for name in (*FILES, CALIBRATION, REPORT_FILE))


def push_to_hub(
    folder: str | PathLike[str],
    repo_id: str,
    *,
    private: bool | None = None,
    revision: str | None = None,
    base_model: str | None = None,
    records: Sequence[Record] | None = None,
) -> str:
    """Uploads a posterior's folder in one commit: the adapter, the posterior, calibration, card.

    A `README.md` that lies in the folder is the card; without one it is made, as `write_card` does.
    Checkpoints, records and a run's settings stay here.

    Args:
        folder: of `fit`, or a LoRA adapter's.
        repo_id: as owner/name; made if it is not there.
        private: whether a new repository is private; None for the account's default.
        revision: the branch to upload to, made if it is not there; None for the main one.
        base_model: what the base model is called on the Hub, where the fit took it from a folder:
            the uploaded files name it so.
        records: for the card; None for those that lie in the folder.

    Returns:
        The address of the commit.

    Raises:
        Refusal: if the repository's name is not owner/name, the folder's fit is unfinished or a
            file of it cut off, its calibration needs files outside of it, its base is a folder of
            this machine, its card is another fit's, or `private` is asked for and the repository
            exists and is public.
        ConnectionError: if the Hub cannot be reached, or does not allow it.
    """
    _check_repo_id(repo_id)
    place = _finished(Path(folder).expanduser())
    known = Known.of(place, records, base_model)
    _refuse_local_base(known, base_model)
    _refuse_outside(known)
    with tempfile.TemporaryDirectory() as scratch:
        staged = Path(scratch)
        for name in files_of(place):
            (staged / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(place / name, staged / name)
        if base_model is not None:
            _rename_base(staged, base_model, known)
        _add_card(staged, known, repo_id)
        return _upload(staged, repo_id, private, revision)


def _check_repo_id(repo_id: str) -> None:
    try:
        validate_repo_id(repo_id)
        good = "/" in repo_id
    except HFValidationError:
        good = False
    if not good:
        raise Refusal(f"got the repository {repo_id!r}, expected owner/name; correct it")


def _finished(folder: Path) -> Path:
    """The folder that holds the artefact, once it is checked to be whole.

    Raises:
        Refusal: if the fit has not ended, or a file is missing or cut off.
    """
    if not folder.is_dir():
        raise Refusal(f"got {folder}, which is not a folder; expected one of `fit`; check the path")
    not_ended = (folder / _RUN).is_file() and not (folder / DETAILS).is_file()
    if not_ended or (folder / _UNFINISHED).is_dir():
        raise Refusal(
            f"{folder} holds a run that has not ended: got no whole posterior, expected a finished "
            "fit; go on with --resume"
        )
    place = artefact_folder(folder)
    for name in files_of(place):
        if name.endswith(".safetensors"):
            try:
                safe_open(place / name, framework="pt")
            except (SafetensorError, OSError) as error:
                raise Refusal(
                    f"{place / name} is missing or cut off: got {error}, expected a whole file; "
                    "restore it, or fit again"
                ) from error
    return place


def files_of(place: Path, inside: str = "") -> Iterator[str]:
    """Names, within `place`, of all files that an artefact must have, and of the optional ones.

    Optional ones (calibration, fit report) are named if they are there. Members of a mixture, and
    the posterior that a temperature is applied to, lie in folders of their own.

    Args:
        place: the artefact's folder.
        inside: a folder within it, with a slash at the end; "" for the artefact itself.
    """
    folder = place / inside
    details = details_if_any(folder)
    inner = [*details.get("members", ()), *([details["base"]] if "base" in details else [])]
    if not inner:
        weights = [name for name in WEIGHTS if (folder / name).is_file()] or [WEIGHTS[0]]
        yield from (f"{inside}{name}" for name in (CONFIG, *weights))
    if details:
        if not inner:
            yield f"{inside}{TENSORS}"
        yield f"{inside}{DETAILS}"
    for name in (CALIBRATION, REPORT_FILE):
        if (folder / name).is_file():
            yield f"{inside}{name}"
    for name in inner:
        yield from files_of(place, f"{inside}{name}/")


def _refuse_local_base(known: Known, base_model: str | None) -> None:
    """Refuses to publish a base model's name that is a folder, which nobody else has."""
    base = Path(known.base or "").expanduser()
    if base_model is None and known.base and (base.is_absolute() or base.exists()):
        raise Refusal(
            f"got a posterior whose base model is the folder {known.base}, which others do not "
            "have; expected a model of the Hub; give --base_model OWNER/NAME, its id there"
        )


def _refuse_outside(known: Known) -> None:
    """Refuses a calibration that predicts with a student: it lies in another folder."""
    settings = known.calibration.settings if known.calibration else {}
    student = PredictionOptions.of(settings).student
    if student is not None:
        raise Refusal(
            f"got a calibration that predicts with the student in {student}, which is not part "
            "of the posterior; expected one that needs its own folder alone; push the student by "
            "itself, or run `bayestune calibrate` without --student"
        )


def _rename_base(staged: Path, base_model: str, known: Known) -> None:
    """Writes the base's Hub id into the copied files, and their new digest into the calibration."""
    field_of = {CONFIG: "base_model_name_or_path", DETAILS: "base_model"}
    for path in [*staged.rglob(CONFIG), *staged.rglob(DETAILS)]:
        content = json.loads(path.read_text(encoding="utf-8"))
        if field_of[path.name] in content:
            content[field_of[path.name]] = base_model
            path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    if known.calibration is not None:
        replace(known.calibration, posterior=posterior_digest(staged)).write(staged)


def _add_card(staged: Path, known: Known, repo_id: str) -> None:
    """Puts the folder's own card, or else a new one, among the staged files.

    Raises:
        Refusal: if the folder's card is of another fit.
    """
    path = known.place / CARD
    if not path.is_file():
        (staged / CARD).write_text(str(make_card(known, repo_id)), encoding="utf-8")
        return
    text = path.read_text(encoding="utf-8")
    digest = card_digest(text)
    if digest is not None and digest != known.digest:
        raise Refusal(
            f"got a card in {path} of another posterior ({digest[:12]}…), expected one of this "
            f"({known.digest[:12]}…): it was fitted again; run `bayestune card --overwrite`"
        )
    (staged / CARD).write_text(text, encoding="utf-8")


def _upload(staged: Path, repo_id: str, private: bool | None, revision: str | None) -> str:
    """Uploads a folder, after making repository and branch if needed; returns the commit's address.

    Raises:
        Refusal: if it shall be private and the repository exists and is public.
        ConnectionError: if the Hub cannot be reached, or does not allow it.
    """
    api = HfApi()
    try:
        api.create_repo(repo_id, private=private, repo_type="model", exist_ok=True)
        would_be_public = private and not api.repo_info(repo_id, repo_type="model").private
        if revision is not None and not would_be_public:
            api.create_branch(repo_id, branch=revision, repo_type="model", exist_ok=True)
        if not would_be_public:
            info: Any = api.upload_folder(
                repo_id=repo_id,
                folder_path=staged,
                revision=revision,
                commit_message="Upload a posterior with bayestune",
                delete_patterns=list(_OURS),
            )
            return str(info.commit_url)
    except Exception as error:  # the client's transport errors share no public base class
        reason = next(iter(str(error).strip().splitlines()), "")
        raise ConnectionError(
            f"{repo_id} cannot be uploaded: got {type(error).__name__} ({reason}), expected a "
            "repository that this account may write to; log in with `hf auth login`, or go online"
        ) from error
    raise Refusal(
        f"got private=True for {repo_id}, which is there and public; expected a new or a private "
        "one; change it on the Hub, or choose another name"
    )
