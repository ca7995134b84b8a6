"""The OpenAPI document says what the routes do, held against them by schemathesis.

Its own pytest plugin knows no pytest of today: the operations are walked here.
"""

from __future__ import annotations

from typing import Any

import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis import checks
from schemathesis.specs.openapi import checks as openapi_checks

CHECKS = [
    checks.not_a_server_error,
    openapi_checks.status_code_conformance,
    openapi_checks.content_type_conformance,
    openapi_checks.response_schema_conformance,
]
QUIET = settings(
    max_examples=6,
    deadline=None,
    derandomize=True,
    database=None,
    phases=[Phase.explicit, Phase.generate],
    suppress_health_check=list(HealthCheck),
)


def test_routes_answer_as_the_document_says(client: Any) -> None:
    schema = schemathesis.openapi.from_asgi("/openapi.json", client.app)
    operations = [result.ok() for result in schema.get_all_operations()]
    assert len(operations) >= 14
    for operation in operations:

        @QUIET
        @given(case=operation.as_strategy())
        def answers_as_said(case: Any) -> None:
            case.call_and_validate(checks=CHECKS, timeout=300)

        answers_as_said()
