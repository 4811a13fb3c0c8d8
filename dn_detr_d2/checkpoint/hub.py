"""Weights in a model repository of the Hugging Face Hub: ``MODEL.WEIGHTS hf://user/name@revision``."""

import re
from urllib.parse import unquote

from ..errors import CheckpointError
from ..utils.requirements import is_installed

SCHEME = "hf://"
WEIGHTS_NAME = "model.safetensors"
_FORM = re.compile(SCHEME + r"(?P<repo>[\w.-]+/[\w.-]+)(@(?P<revision>[^/@]+))?(/(?P<file>[^@]+))?")


def download(weights: str) -> str:
    """The path of a file of the hub in its cache on this machine; what is in it is not checked here.

    Args:
        weights: ``hf://user/name``, then ``@`` and a commit, tag or branch ("main" without; a slash in it is %2F), then
            ``/`` and a file ("model.safetensors" without).

    Raises:
        CheckpointError: another form, or huggingface_hub is not installed. Errors of the network are those of
            huggingface_hub.
    """
    match = _FORM.fullmatch(weights)
    if match is None:
        raise CheckpointError(f"MODEL.WEIGHTS {weights!r} is not of the form hf://user/name@revision; write it so")
    if not is_installed("huggingface_hub"):
        raise CheckpointError(
            f"MODEL.WEIGHTS {weights!r} needs the package huggingface_hub; pip install 'dn_detr_d2[hub]'"
        )
    from huggingface_hub import hf_hub_download

    revision = match["revision"] and unquote(match["revision"])
    return hf_hub_download(match["repo"], match["file"] or WEIGHTS_NAME, revision=revision)
