"""``medray serve``: bundles over HTTP."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from medray.cli.show import say


def serve(
    what: Annotated[
        list[str],
        typer.Argument(
            metavar="CONFIG | BUNDLE...", help="serve.yaml; or bundles, or models:/NAME@champion, each a model."
        ),
    ],
    port: Annotated[int | None, typer.Option(help="[default: 8000]")] = None,
    grpc_port: Annotated[
        int | None, typer.Option(help="Also answer the Open Inference Protocol over gRPC, on this port.")
    ] = None,
    host: Annotated[
        str | None, typer.Option(help="Address to listen on; beyond loopback with --keys. [default: 127.0.0.1]")
    ] = None,
    keys: Annotated[Path | None, typer.Option(help="File of 'medray keys'; without it anyone may ask.")] = None,
    state: Annotated[
        Path | None, typer.Option(help="Folder of the audit trail and the log. [default: runs/serve]")
    ] = None,
    runtime: Annotated[Literal["auto", "torch", "onnx", "openvino"] | None, typer.Option(help="What computes.")] = None,
    address: Annotated[str | None, typer.Option(help="host:port of a Ray cluster to serve on.")] = None,
    registry: Annotated[Path, typer.Option(help="Folder with the mlflow.db that models:/... is looked up in.")] = Path(
        "runs"
    ),
) -> None:
    """Serve: images in, answers out, until Ctrl-C. The server follows its configuration file while it runs.

    Change a bundle, a version or a share in the file, and it is in place within seconds, with no request lost; put the
    former back, and so is that. A change that can't be carried out changes nothing.

    Example: medray serve runs/seg/bundle, then curl --data-binary @scan.nii.gz http://127.0.0.1:8000/v1/predict
    """
    from medray.workflows.serving import serve as run

    changes: dict[str, Any] = {
        name: str(value) if isinstance(value, Path) else value
        for name, value in (("host", host), ("port", port), ("grpc_port", grpc_port), ("state", state))
        if value is not None
    }
    if keys is not None:
        changes["security"] = {"keys": str(keys)}

    def started(url: str, path: Path) -> None:
        say(f"serving at {url}; ask {url}/v1/models, or send an image to {url}/v1/predict")
        say(f"follows {path}; Ctrl-C ends it")

    run(what, changes=changes, runtime=runtime, address=address, registry=registry, note=say, started=started)
