"""A page's curl, asked of a service in this process."""

import argparse
from urllib.parse import urlsplit

from fastapi.testclient import TestClient

from bayestune.serving import ArtefactStore, Limits, ServiceOptions
from bayestune.serving.application import make_app


def asked(folder, words):
    """The text that a service of this folder answers to the words of a curl command."""
    parser = argparse.ArgumentParser()
    parser.add_argument("address")
    parser.add_argument("--header", default="accept: */*")
    parser.add_argument("--data")
    for count in ("--retry", "--retry-delay"):
        parser.add_argument(count)
    for switch in ("--silent", "--fail", "--retry-connrefused"):
        parser.add_argument(switch, action="store_true")
    given = parser.parse_args(words[1:])
    app = make_app(ArtefactStore([folder]), Limits(), ServiceOptions(reload_seconds=0))
    with TestClient(app, base_url="http://localhost") as client:
        name, _, value = given.header.partition(": ")
        verb = "POST" if given.data else "GET"
        path = urlsplit(given.address).path
        reply = client.request(verb, path, content=given.data, headers={name: value})
    assert reply.status_code == 200, reply.text
    return reply.text
