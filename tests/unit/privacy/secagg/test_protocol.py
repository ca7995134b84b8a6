"""A round of secure aggregation: what the server can make of all that it receives, and what sites refuse to say."""

from __future__ import annotations

import datetime as dt
import itertools
import json
import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from medray.errors import FederationError
from medray.learn.aggregation.fixed import FixedPoint, fixed_point
from medray.privacy.credentials import Identity, issue_node, new_authority
from medray.privacy.secagg.crypto import agree, new_secret, open_envelope, public_of, seal, stream
from medray.privacy.secagg.identity import Signer
from medray.privacy.secagg.roster import PublicKeys, threshold_of
from medray.privacy.secagg.server import SecureServer
from medray.privacy.secagg.site import STAGES, SecureSite, Stage

NAMES = ("bonn", "jena", "kiel", "ulm", "wien")
SIZE = 4000
TOPIC = "recipe/0"

Codes = npt.NDArray[Any]


class Round:
    """Five sites and a server; everything that the server receives is written down."""

    def __init__(self, *, alike: bool = True, quorum: int = 3, signers: Mapping[str, Signer] | None = None) -> None:
        rng = np.random.default_rng(3)
        self.updates = {name: rng.normal(0, 0.01, SIZE) for name in NAMES}
        self.weights = dict.fromkeys(NAMES, 1) if alike else {name: 10 + 7 * n for n, name in enumerate(NAMES)}
        self.alike, self.signers = alike, dict(signers or {})
        self.sites = {name: SecureSite.begin(topic=TOPIC, name=name, quorum=quorum) for name in NAMES}
        keys = {name: site.keys(self.signers.get(name)) for name, site in self.sites.items()}
        self.server = SecureServer(TOPIC, keys, quorum)
        self.received: list[tuple[str, str, Any]] = [("keys", name, found.plain()) for name, found in keys.items()]
        self.shared: set[str] = set()
        self.masked: dict[str, Codes] = {}

    @property
    def point(self) -> FixedPoint:
        return fixed_point(sites=len(NAMES), alike=self.alike)

    def ask(self, name: str, stage: Stage, **said: Any) -> tuple[dict[str, Any], Codes | None]:
        # As from a file after a restart.
        site = SecureSite(**json.loads(json.dumps(self.sites[name].plain())))
        self.sites[name] = site
        text, codes = site.answer(
            stage,
            said,
            signer=self.signers.get(name),
            codes=lambda _: self.point.encode(self.updates[name], self.weights[name]),
        )
        self.received.append((stage, name, codes if codes is not None else text))
        return text, codes

    def run(self, gone: Mapping[str, Stage] = {}) -> Codes:
        """The sum; ``gone``: the stage that a site doesn't answer any more."""

        def there(names: set[str], stage: Stage) -> list[str]:
            return sorted(n for n in names if n not in gone or STAGES.index(stage) < STAGES.index(gone[n]))

        roster = self.server.told()
        sealed = {
            name: self.server.envelopes(name, self.ask(name, "shares", roster=roster)[0]["envelopes"])
            for name in there(set(NAMES), "shares")
        }
        self.shared = set(sealed)
        for name in there(self.shared, "masked"):
            routed = {sender: sealed[sender][name] for sender in self.shared - {name}}
            codes = self.ask(name, "masked", envelopes=routed)[1]
            assert codes is not None
            self.masked[name] = codes
        survivors = sorted(self.masked)
        signed = {
            name: self.ask(name, "confirm", survivors=survivors)[0]["signature"]
            for name in there(set(survivors), "confirm")
        }
        given = {
            name: self.server.shares(self.ask(name, "unmask", signatures=signed)[0], self.shared, set(survivors))
            for name in there(set(signed), "unmask")
        }
        return self.server.open(self.masked, self.shared, given)

    def mean(self, names: set[str]) -> npt.NDArray[np.float64]:
        total = sum(self.weights[n] for n in names)
        return np.sum([self.updates[n] * (self.weights[n] / total) for n in names], axis=0)


@pytest.fixture(scope="module")
def signers() -> dict[str, Signer]:
    now = dt.datetime.now(dt.UTC)
    authority = new_authority("lungs", now=now)
    return {name: signer(authority, name) for name in NAMES}


def signer(authority: Identity, name: str, called: str | None = None) -> Signer:
    node = issue_node(authority, name, now=dt.datetime.now(dt.UTC), days=2)
    return Signer(called or name, certificate=node.certificate, key=node.key, authority=authority.certificate)


@pytest.mark.parametrize("alike", [True, False])
def test_the_sum_is_that_of_the_updates(alike: bool) -> None:
    made = Round(alike=alike)
    found = made.point.decode(made.run(), sites=5)
    assert found is not None and found[1] == sum(made.weights.values())
    assert np.abs(found[0] - made.mean(set(NAMES))).max() <= made.point.step / 2 * (1 + 1e-9)


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("count", [1, 2])
def test_sites_may_go_at_any_stage(stage: Stage, count: int) -> None:
    made = Round(alike=False)
    gone = dict.fromkeys(("jena", "wien")[:count], stage)
    found = made.point.decode(made.run(gone), sites=len(made.masked))
    # Who has handed in is in the sum, also if it is gone when it comes to unmasking.
    assert set(made.masked) == set(NAMES) - (gone.keys() if stage in ("shares", "masked") else set())
    assert found is not None
    assert np.abs(found[0] - made.mean(set(made.masked))).max() <= made.point.step


def test_some_go_at_one_stage_and_some_at_the_next() -> None:
    made = Round()
    found = made.point.decode(made.run({"bonn": "masked", "ulm": "unmask"}), sites=4)
    assert found is not None and np.abs(found[0] - made.mean(set(NAMES) - {"bonn"})).max() <= made.point.step


@pytest.mark.parametrize("stage", STAGES)
def test_of_too_few_there_is_no_sum(stage: Stage) -> None:
    made = Round()
    with pytest.raises(FederationError, match=r"fewer than 3|of the 3"):
        made.run(dict.fromkeys(("bonn", "jena", "kiel"), stage))


def test_what_the_server_receives_is_noise_but_for_the_sum() -> None:
    """The same updates twice: all bytes are spread evenly, no entry follows its update, and no part of them decodes."""
    first, again = Round(), Round()
    sums = [made.run() for made in (first, again)]
    assert np.array_equal(sums[0], sums[1])
    for made in (first, again):
        for name, codes in made.masked.items():
            assert _evenly_spread(codes.tobytes())
            plain = made.point.encode(made.updates[name], 1)
            assert _evenly_spread((codes - plain).tobytes())
            correlation = np.corrcoef(codes.astype(np.float64)[:-1], made.updates[name])[0, 1]
            assert abs(correlation) < 5 / math.sqrt(SIZE)
        for count in range(1, 5):
            for names in itertools.combinations(NAMES, count):
                part = np.sum([made.masked[name] for name in names], axis=0, dtype=made.point.dtype)
                assert made.point.decode(part, sites=count) is None and _evenly_spread(part.tobytes())
        every = np.sum(list(made.masked.values()), axis=0, dtype=made.point.dtype)
        assert made.point.decode(every, sites=5) is None, "each site's own mask is on it still"
    for name in NAMES:  # with keys of another round, the same update is another word everywhere
        assert (first.masked[name] == again.masked[name]).mean() < 0.01
    # Nothing else that arrived holds an update, or a secret in the clear.
    texts = [json.dumps(content) for what, _, content in first.received if what != "masked"]
    for name in NAMES:
        words = first.point.encode(first.updates[name], 1)[:8].tobytes().hex()
        assert not any(words in text for text in texts)


def test_never_both_secrets_of_a_site() -> None:
    """Of one that handed in shares of its seed arrive, of one that didn't those of its masking key."""
    made = Round()
    made.run({"ulm": "masked"})
    answers = [content for what, _, content in made.received if what == "unmask"]
    assert len(answers) == 4
    for answer in answers:
        assert set(answer["seeds"]) == set(NAMES) - {"ulm"} and set(answer["keys"]) == {"ulm"}
    # The one that was cut off may hand in late: it is still covered by its own mask.
    assert made.sites["ulm"].seed and not made.sites["kiel"].seed, "who is done has forgotten its secrets"
    assert not made.sites["kiel"].envelopes and not made.sites["kiel"].own


def test_a_question_is_answered_once() -> None:
    made = Round()
    roster = made.server.told()
    sealed = {name: made.ask(name, "shares", roster=roster)[0]["envelopes"] for name in NAMES}
    assert made.ask("kiel", "shares", roster=roster)[0]["envelopes"] == sealed["kiel"], "to the same, the same"
    others = {sender: sealed[sender]["kiel"] for sender in NAMES if sender != "kiel"}
    once = made.ask("kiel", "masked", envelopes=others)[1]
    assert once is not None and made.ask("kiel", "masked", envelopes=others) == ({}, None), "the caller has kept it"
    fewer = {sender: others[sender] for sender in list(others)[:2]}
    with pytest.raises(FederationError, match="asked for masked of this round before"):
        made.ask("kiel", "masked", envelopes=fewer)
    with pytest.raises(FederationError, match="out of turn"):
        made.ask("jena", "confirm", survivors=list(NAMES))
    made.ask("kiel", "confirm", survivors=["bonn", "jena", "kiel"])
    with pytest.raises(FederationError, match="asked for confirm of this round before"):
        made.ask("kiel", "confirm", survivors=list(NAMES))
    signed = dict.fromkeys(("bonn", "jena", "kiel"), "")
    answer = made.ask("kiel", "unmask", signatures=signed)[0]
    assert made.ask("kiel", "unmask", signatures=signed)[0] == answer
    with pytest.raises(FederationError, match="asked for unmask of this round before"):
        made.ask("kiel", "unmask", signatures=dict.fromkeys(("ulm", "jena", "kiel"), ""))


P25519 = 2**255 - 19


@pytest.mark.parametrize("twin", ["top bit", "unreduced"])
def test_a_twin_of_anothers_key_cancels_no_mask(twin: str) -> None:
    """jena, who colludes, signs a key that X25519 takes for wien's: kiel takes one stream away and adds the other."""
    made = Round()
    honest = int.from_bytes(made.server.roster["wien"].mask, "little")
    # The few numbers below 19 have a second spelling below 2^255: nobody draws one, but an attacker may.
    own, other = (honest, honest | 1 << 255) if twin == "top bit" else (9, 9 + P25519)
    told = made.server.told()
    for name, number in (("wien", own), ("jena", other)):
        told[name]["mask"] = number.to_bytes(32, "little").hex()
    made.ask("kiel", "shares", roster=told)
    masked = made.ask("kiel", "masked", envelopes={"jena": "00", "wien": "00"})[1]
    assert masked is not None
    left = masked - stream(bytes.fromhex(made.sites["kiel"].seed), masked.size, masked.dtype)
    plain = made.point.encode(made.updates["kiel"], 1)
    assert (left == plain).mean() < 0.01, "the streams of jena and wien cancel: the server, told the seed, has it all"
    assert _evenly_spread((left - plain).tobytes())


def test_what_would_leave_too_few_to_hide_among_is_refused() -> None:
    made = Round()
    roster = made.server.told()
    with pytest.raises(FederationError, match="fewer than 3: too few to hide"):
        made.ask("kiel", "shares", roster={name: roster[name] for name in ("kiel", "jena")})
    with pytest.raises(FederationError, match="its own keys"):
        made.ask("kiel", "shares", roster={name: roster[name] for name in NAMES if name != "kiel"})
    with pytest.raises(FederationError, match="alike"):
        made.ask("kiel", "shares", roster=roster | {"copy": roster["jena"]})
    sealed = {name: made.ask(name, "shares", roster=roster)[0]["envelopes"] for name in NAMES}
    with pytest.raises(FederationError, match=r"2 of 5 sites shared.*fewer than 3"):
        made.ask("kiel", "masked", envelopes={"jena": sealed["jena"]["kiel"]})
    with pytest.raises(FederationError, match="none of this round"):
        made.ask("kiel", "masked", envelopes={"paris": "00"})
    made.ask("kiel", "masked", envelopes={sender: sealed[sender]["kiel"] for sender in NAMES if sender != "kiel"})
    for survivors, reason in ((["kiel", "jena"], "2 of 5"), (["bonn", "jena", "ulm"], "aren't those")):
        with pytest.raises(FederationError, match=reason):
            made.ask("kiel", "confirm", survivors=survivors)
    made.ask("kiel", "confirm", survivors=["kiel", "jena", "bonn"])
    with pytest.raises(FederationError, match="2 of 5 sites confirmed"):
        made.ask("kiel", "unmask", signatures=dict.fromkeys(("kiel", "jena"), ""))


@pytest.mark.parametrize(("sites", "quorum", "wanted"), [(3, 3, 3), (4, 3, 3), (5, 3, 3), (6, 3, 4), (7, 6, 6)])
def test_the_threshold_is_the_quorum_and_more_than_half(sites: int, quorum: int, wanted: int) -> None:
    assert threshold_of(sites, quorum) == wanted and 2 * wanted > sites


def test_a_false_share_spoils_the_round_and_gives_nothing_away() -> None:
    made = Round()
    open_sum = made.server.open

    def falsified(masked: Any, shared: Any, given: Any) -> Codes:
        given["kiel"]["seeds"]["jena"] += 1
        return open_sum(masked, shared, given)

    made.server.open = falsified  # type: ignore[method-assign]
    try:
        assert made.point.decode(made.run(), sites=5) is None
    except FederationError as error:
        assert "fit together" in str(error)  # in half of the cases it isn't even a number of 32 bytes
    made = Round()
    made.run({"ulm": "masked"})
    given = {
        name: made.server.shares(answer, set(NAMES), set(NAMES) - {"ulm"})
        for what, name, answer in made.received
        if what == "unmask"
    }
    given["kiel"]["keys"]["ulm"] += 1
    with pytest.raises(FederationError, match="one of them is false"):
        made.server.open(made.masked, set(NAMES), given)


def test_with_node_keys_the_server_can_be_nobody(signers: dict[str, Signer]) -> None:
    made = Round(signers=signers)
    found = made.point.decode(made.run({"ulm": "masked"}), sites=4)
    assert found is not None and np.abs(found[0] - made.mean(set(NAMES) - {"ulm"})).max() <= made.point.step

    made = Round(signers=signers)
    honest = made.server.roster["jena"]
    own = PublicKeys(envelope=public_of(new_secret()), mask=public_of(new_secret()))  # whose private keys it has
    stranger = signer(new_authority("lungs", now=dt.datetime.now(dt.UTC)), "jena")
    from medray.privacy.secagg.roster import keys_text

    text = keys_text(TOPIC, "jena", own.envelope, own.mask)
    attempts = {
        "no certificate": own,
        "signature of site 'jena' is false": replace(own, certificate=honest.certificate, signature=honest.signature),
        "not signed by this federation's authority": replace(
            own, certificate=stranger.certificate, signature=stranger.sign(text)
        ),
        "is signed by 'bonn'": replace(
            own, certificate=signers["bonn"].certificate, signature=signers["bonn"].sign(text)
        ),
    }
    for reason, keys in attempts.items():
        with pytest.raises(FederationError, match=reason):
            made.ask("kiel", "shares", roster=made.server.told() | {"jena": keys.plain()})
    # Keys that were signed for another round are none of this one.
    old = SecureSite.begin(topic="recipe/7", name="jena", quorum=3).keys(signers["jena"])
    with pytest.raises(FederationError, match="is false"):
        made.ask("kiel", "shares", roster=made.server.told() | {"jena": old.plain()})


def test_with_node_keys_the_server_can_tell_no_two_stories(signers: dict[str, Signer]) -> None:
    """To have both secrets of jena, it would tell some that she handed in, and others that she didn't."""
    made = Round(signers=signers)
    roster = made.server.told()
    sealed = {name: made.ask(name, "shares", roster=roster)[0]["envelopes"] for name in NAMES}
    for name in NAMES:
        made.ask(name, "masked", envelopes={s: sealed[s][name] for s in NAMES if s != name})
    stories = {"bonn": NAMES, "kiel": NAMES, "jena": NAMES, "ulm": ("bonn", "kiel", "ulm", "wien")}
    signed = {name: made.ask(name, "confirm", survivors=list(story))[0]["signature"] for name, story in stories.items()}
    with pytest.raises(FederationError, match="signature of site 'bonn' is false"):
        made.ask("ulm", "unmask", signatures={name: signed[name] for name in ("ulm", "bonn", "kiel")})


def test_a_signer_is_of_one_kit() -> None:
    authority = new_authority("lungs", now=dt.datetime.now(dt.UTC))
    kiel, jena = (issue_node(authority, name, now=dt.datetime.now(dt.UTC), days=2) for name in ("kiel", "jena"))
    for name, key in (("kiel", jena.key), ("jena", kiel.key)):
        with pytest.raises(FederationError, match="one start-up kit"):
            Signer(name, certificate=kiel.certificate, key=key, authority=authority.certificate)
    with pytest.raises(FederationError, match="no OpenSSH private key"):
        Signer("kiel", certificate=kiel.certificate, key=b"nothing", authority=authority.certificate)


def test_keys_are_agreed_for_one_purpose_and_streams_are_their_keys() -> None:
    a, b = new_secret(), new_secret()
    assert agree(a, public_of(b), purpose=b"x") == agree(b, public_of(a), purpose=b"x")
    assert agree(a, public_of(b), purpose=b"x") != agree(a, public_of(b), purpose=b"y")
    with pytest.raises(FederationError, match="is none"):
        agree(a, bytes(32), purpose=b"x")
    words = stream(a, 3_000_001, np.dtype("<u4"))
    assert np.array_equal(words[:10], stream(a, 10, np.dtype("<u4"))) and _evenly_spread(words.tobytes())
    assert words[:2].tobytes() == stream(a, 1, np.dtype("<u8")).tobytes()
    envelope = seal(a, b"text", b"about")
    assert open_envelope(a, envelope, b"about") == b"text" and seal(a, b"text", b"about") != envelope
    assert open_envelope(a, envelope, b"else") is None and open_envelope(b, envelope, b"about") is None
    assert open_envelope(a, envelope[:-1], b"about") is None and open_envelope(a, b"", b"about") is None


def test_chacha20_is_rfc_8439s() -> None:
    """Its keystream of an all-zero key and nonce (appendix A.1, test vector 1)."""
    assert stream(bytes(32), 8, np.dtype("<u4")).tobytes().hex().startswith("76b8e0ada0f13d90405d6ae55386bd28")


@pytest.mark.parametrize("bad", [None, 3, {"kiel": 3}, {"kiel": {"envelope": "zz"}}, {"kiel": {"mask": "00"}}])
def test_what_a_stranger_sends_is_an_error_and_no_crash(bad: Any) -> None:
    made = Round()
    with pytest.raises(FederationError):
        made.ask("kiel", "shares", roster=bad)
    with pytest.raises(FederationError):
        made.server.envelopes("kiel", bad)
    with pytest.raises(FederationError):
        made.server.shares({"seeds": bad, "keys": {}}, set(NAMES), set(NAMES))


def _evenly_spread(content: bytes) -> bool:
    """Pearson's test over the 256 values of a byte: a mean of 255, beyond 6 standard deviations once in a billion."""
    counts = np.bincount(np.frombuffer(content, np.uint8), minlength=256)
    expected = len(content) / 256
    return float(((counts - expected) ** 2 / expected).sum()) < 255 + 6 * math.sqrt(2 * 255)
