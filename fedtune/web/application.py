"""The routes of the page. Each reads the store once and renders one template."""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import quote

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from starlette.applications import Starlette
from starlette.datastructures import URL
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import HTMLResponse, RedirectResponse, Response
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles

from fedtune.errors import StoreError
from fedtune.tracking import Store
from fedtune.untrusted import clean_lines, clean_text
from fedtune.web import number_text
from fedtune.web.compare_page import make_compare_view, split_run_ids
from fedtune.web.live_events import LiveStreams
from fedtune.web.outcome_words import describe_reason
from fedtune.web.page_error import PageError
from fedtune.web.page_key import PageKey
from fedtune.web.recipe_view import write_recipe
from fedtune.web.request_guard import RequestGuard
from fedtune.web.run_page import find_run, make_run_view
from fedtune.web.run_query import RunQuery
from fedtune.web.runs_page import make_runs_view
from fedtune.web.runs_query import RunsQuery

__all__ = ["make_application", "make_templates"]

_FOLDER = Path(__file__).parent
_THEMES = ("light", "dark")
_COOKIE = "fedtune-theme"
_FAILURE = "The page failed with {}; the terminal of fedtune ui shows where, please report it."
_log = logging.getLogger(__name__)
View = Callable[[Store, Request], tuple[str, dict[str, Any]]]


def make_application(store: Store, host: str = "127.0.0.1", key: str | None = None) -> Starlette:
    """Make the application for a store.

    ``host`` is the name that it is reached by, besides addresses. With a ``key``, only those who have it see anything.
    """
    templates = make_templates()
    routes = [
        Route("/", lambda _: RedirectResponse("/runs")),
        Route("/runs", _make_endpoint(store, templates, _view_runs)),
        Route("/runs/{run_id}", _make_endpoint(store, templates, _view_run)),
        Route("/runs/{run_id}/recipe.yaml", _make_recipe_endpoint(store)),
        Route("/compare", _make_endpoint(store, templates, _view_comparison)),
        Route("/runs/{run_id}/events", _make_event_endpoint(LiveStreams(store))),
        Mount("/static", StaticFiles(directory=_FOLDER / "static")),
    ]
    handlers: dict[Any, Any] = {
        HTTPException: _make_handler(templates),
        PageError: _make_handler(templates),
        StoreError: _make_handler(templates),
    }
    guards = [Middleware(RequestGuard, host), *([Middleware(PageKey, key)] if key else [])]
    return Starlette(routes=routes, exception_handlers=handlers, middleware=guards)


def make_templates() -> Environment:
    """Make the environment of the templates. Everything is escaped, and a name that is not given is an error."""
    environment = Environment(
        loader=FileSystemLoader(_FOLDER / "templates"), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    formats = {name: getattr(number_text, name) for name in number_text.__all__}
    environment.filters |= formats | {
        "clean": clean_text,
        "clean_lines": clean_lines,
        "segment": quote_segment,
        "relative": get_relative,
    }
    environment.filters["reason"] = describe_reason
    return environment


def quote_segment(text: str) -> str:
    """Quote a text as one part of a path, slashes too."""
    return quote(text, safe="")


def get_relative(url: URL) -> str:
    """Return the path and the query of an address, without its host."""
    return f"{url.path}?{url.query}" if url.query else url.path


def _make_endpoint(store: Store, templates: Environment, view: View) -> Callable[[Request], Response]:
    def answer(request: Request) -> Response:
        try:
            name, values = view(store, request)
            return _render(templates, request, name, values)
        except (PageError, StoreError):
            raise
        except Exception as error:
            _log.exception("the page %s failed", request.url.path)
            raise PageError(500, _FAILURE.format(type(error).__name__)) from error

    return answer


def _render(
    templates: Environment, request: Request, name: str, values: dict[str, Any], status: int = 200
) -> HTMLResponse:
    asked = request.query_params.get("theme", "")
    theme = asked if asked in _THEMES else request.cookies.get(_COOKIE, "")
    shown = {"theme": theme if theme in _THEMES else "", "path": request.url.path, "here": request.url}
    response = HTMLResponse(templates.get_template(name).render(values | shown), status)
    if asked in (*_THEMES, "system"):
        response.set_cookie(_COOKIE, asked, max_age=365 * 86400, httponly=True, samesite="strict")
    return response


def _make_handler(templates: Environment) -> Callable[[Request, Exception], Response]:
    def explain(request: Request, error: Exception) -> Response:
        status, problem = _describe_error(error)
        return _render(templates, request, "error.html", {"status": status, "problem": problem}, status)

    return explain


def _describe_error(error: Exception) -> tuple[int, str]:
    if isinstance(error, PageError):
        return error.status, error.problem
    if isinstance(error, HTTPException):
        return error.status_code, "There is no such page."
    return 503, f"{error}."


def _make_recipe_endpoint(store: Store) -> Callable[[Request], Response]:
    def answer(request: Request) -> Response:
        run = find_run(store, request.path_params["run_id"])
        name = quote_segment(f"{run.id}.yaml")
        headers = {"content-disposition": f"attachment; filename*=UTF-8''{name}"}
        return Response(write_recipe(run), media_type="application/yaml", headers=headers)

    return answer


def _make_event_endpoint(streams: LiveStreams) -> Callable[[Request], Response]:
    return lambda request: streams.make_response(request.path_params["run_id"])


def _view_run(store: Store, request: Request) -> tuple[str, dict[str, Any]]:
    run = find_run(store, request.path_params["run_id"])
    return "run.html", make_run_view(store, run, RunQuery.parse(run.id, request.query_params))


def _view_comparison(store: Store, request: Request) -> tuple[str, dict[str, Any]]:
    ids = split_run_ids(request.query_params.getlist("runs"))
    if len(ids) < 2:
        return "compare.html", {"runs": ids}
    return "compare.html", make_compare_view(store, ids, request.query_params)


def _view_runs(store: Store, request: Request) -> tuple[str, dict[str, Any]]:
    return "runs.html", make_runs_view(store, RunsQuery.parse(request.query_params))
