"""`kvloom serve`: the OpenAI-compatible server.

Knows: the order of a start: check the address, load the model, listen.
Does not know: HTTP.
"""

from __future__ import annotations

from kvloom.cli.progress import long_work
from kvloom.cli.settings import BatchOptions, EngineOptions, ModelOption, ServerOptions
from kvloom.cli.terminal import Terminal
from kvloom.errors import KvloomError


def serve(
    *,
    model: ModelOption = "default",
    server: ServerOptions,
    options: EngineOptions,
    batch: BatchOptions,
) -> None:
    """Serve the OpenAI API until SIGTERM or Ctrl-C."""
    import asyncio

    terminal = Terminal()
    with long_work(terminal.messages, "Starting", "Preparing the model") as progress:
        from kvloom.engine.aio import AsyncLLM
        from kvloom.engine.shelving import store_folder
        from kvloom.model.source import resolve_source
        from kvloom.serve.app import create_app
        from kvloom.serve.limits import check_address
        from kvloom.serve.server import listen, run

        config = server.config(resolve_source(model).name)
        # A wrong or taken address is said before the model is loaded, not after.
        check_address(config)
        listen(config).close()
        settings = options.settings(progress)
        kept = settings["store"]
        folder = None if kept is None else store_folder(kept, options.cache_dir)
        new_store = None if folder is None or folder.exists() else folder
        llm = AsyncLLM(model, **(settings | batch.settings()))

    def ready(url: str) -> None:
        # A folder that could not be made was warned of, and nothing is kept there.
        if new_store is not None and new_store.exists():
            terminal.say(
                f"KV is kept in {new_store} from now on, readable by this user only; "
                "`kvloom store` lists and removes it, and --no-store keeps none."
            )
        terminal.say(f"Serving {config.served_model_name} at {url}/v1 (documentation: {url}/docs)")

    try:
        run(create_app(llm, config), config, on_ready=ready)
    except KvloomError:
        asyncio.run(llm.close())
        raise
