"""Upload of exported folders to the Hugging Face hub."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, constants, get_token
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, HTTPError, OfflineModeIsEnabled

REMEDIES = {401: "run hf auth login again", 403: "use a token with write access to that name"}


def open_repository(name: str) -> None:
    """Create a model repository on the hub unless it exists, which also checks the token.

    Raises:
        ValueError: there is no token, or the hub rejects the name or the token.
        OSError: the hub cannot be reached.
    """
    if get_token() is None:
        raise ValueError(f"push_to_hub={name} needs a Hugging Face token; run hf auth login, or set HF_TOKEN")
    with _one_line_errors(name):
        HfApi().create_repo(name, exist_ok=True)


def upload(folder: Path, name: str) -> Any:
    """Upload a folder, and return the address of the commit.

    Raises:
        ValueError, OSError: as in `open_repository`.
    """
    with _one_line_errors(name):
        return (
            HfApi().upload_folder(repo_id=name, folder_path=folder, commit_message="Export from hybridmem").commit_url
        )


@contextmanager
def _one_line_errors(name: str) -> Iterator[None]:
    try:
        yield
    except HFValidationError as error:
        raise ValueError(f"push_to_hub={name} is not a model name; give one such as me/my_model") from error
    except HfHubHTTPError as error:
        status = error.response.status_code
        reason, remedy = error.server_message or f"status {status}", REMEDIES.get(status, "try again later")
        raise ValueError(f"push_to_hub={name}: the hub refuses ({reason}); {remedy}") from error
    except OfflineModeIsEnabled as error:
        raise OSError(f"push_to_hub={name} needs the network, but HF_HUB_OFFLINE is set; unset it") from error
    except HTTPError as error:
        raise OSError(f"push_to_hub={name}: cannot reach {constants.ENDPOINT} ({error}); check the network") from error
