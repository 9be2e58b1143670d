"""One Hub and one client process for all tests here; each test has repos of its own."""

from collections.abc import Iterator

import pytest
from hub_client import HubClient, hub_client
from hub_server import HubServer


@pytest.fixture(scope="session")
def hub() -> Iterator[HubServer]:
    with HubServer() as server:
        yield server


@pytest.fixture(scope="session")
def client(hub: HubServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[HubClient]:
    with hub_client(hub.url, tmp_path_factory.mktemp("hub_cache")) as one:
        yield one
