"""``stunet share``: a trained model as a folder, or on the hub, that others can use safely."""

from dataclasses import dataclass

from stunet_plugin.commands.command import Command, flag, option, required
from stunet_plugin.nnunet.names import CHECKPOINT


@dataclass(frozen=True)
class Share(Command):
    """Pass a trained model on: weights as safetensors without optimizer, plan, labels and a model
    card, in a folder or on the Hugging Face hub."""

    command = "share"
    example = "stunet share MODEL_FOLDER --licence cc-by-4.0 --out shared"
    runs = "stunet_plugin.weights.share_model:share_model"
    notes = "\n\nOthers use it as `stunet segment scan.nii.gz -o out -m hf://owner/name`."

    model: str = required(metavar="MODEL_FOLDER", help="TRAINER__PLANS__CONFIGURATION")
    out: str = required("--out", "-o", metavar="PLACE", help="a new folder, or hf://owner/name")
    licence: str = required(
        "--licence", "--license", help="of the weights, as the hub names it: cc-by-4.0, apache-2.0"
    )
    citation: str = option(
        "--citation", default="", metavar="TEXT", help="what users should cite, for the card"
    )
    picture: str | None = option(
        "--picture",
        metavar="PNG",
        help="for the card; if not given, the Dice of the validation (no image of a patient)",
    )
    folds: tuple[str, ...] | None = option(
        "-f", nargs="+", metavar="FOLD", help="folds to share; if not given, all that are trained"
    )
    checkpoint: str = option("-chk", default=CHECKPOINT, help="file in each fold")
    public: bool = flag("--public", "on the hub: for everybody, not private at first")
