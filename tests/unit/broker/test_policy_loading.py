"""Loading a policy: what is wrong is refused with its line, and never half of a file is used."""

from __future__ import annotations

import hashlib
from datetime import timedelta
from ipaddress import ip_network

import pytest

from carnet.errors import ConfigError
from carnet.spiffe import SpiffeID, SpiffeIDPattern
from carnet.verify import Binding
from carnet_broker.core.policy import Admin, PolicyError, PolicyTestError, compile_policy, load_policy, run_tests
from support.policies import ORDERS, POLICY, changed, granted, policy

ORDERS_GRANT = "{ workload: spiffe://prod.example/ns/shop/sa/orders, audience: payments, scopes: [charge] }"
MAIL_GRANT = "{ workload: spiffe://prod.example/ns/shop/**, audience: mail, scopes: [send] }"


def refusal(text: str | bytes) -> tuple[str, ...]:
    """The problems for which `text` is refused."""
    with pytest.raises(PolicyError) as refused:
        load_policy(text, "policy.yaml")
    return refused.value.lines


def test_a_policy_is_read_whole() -> None:
    """Everything in the file is in the policy, with its line."""
    loaded = policy()
    assert ("https://tokens.prod.example", "prod.example") == (loaded.issuer, loaded.trust_domain)
    payments = loaded.audiences["payments"]
    assert (timedelta(minutes=10), Binding.CERTIFICATE, 4) == (payments.max_ttl, payments.binding, payments.line)
    assert (SpiffeIDPattern.parse("spiffe://prod.example/ns/shop/sa/payments"),) == payments.served_by
    assert () == loaded.audiences["bank"].served_by
    assert [15, 16, 17, 18] == [grant.line for grant in loaded.grants]
    breakglass = SpiffeID.parse("spiffe://prod.example/ns/ops/sa/breakglass")
    assert (Admin(breakglass, (ip_network("127.0.0.0/8"), ip_network("::1/128")), 20),) == loaded.admins
    assert [(True, 22), (False, 23)] == [(test.allow, test.line) for test in loaded.tests]


def test_the_version_names_the_text() -> None:
    """Sixteen signs of its SHA-256, the same for text and bytes; another comment is another version."""
    assert hashlib.sha256(POLICY.encode()).hexdigest()[:16] == policy().version
    assert policy().version == load_policy(POLICY.encode(), "other.yaml").version
    assert policy().version != load_policy(POLICY + "# reviewed\n", "policy.yaml").version


def test_what_is_optional_has_the_safe_default() -> None:
    """Bound to the certificate, five minutes, served by nobody, no admins; a grant lives as long as its audience."""
    text = POLICY[: POLICY.index("admins:")].replace("    binding: none\n", "")
    loaded = load_policy(text, "policy.yaml")
    bank = loaded.audiences["bank"]
    assert (Binding.CERTIFICATE, timedelta(minutes=5), ()) == (bank.binding, bank.max_ttl, bank.served_by)
    assert ((), ()) == (loaded.admins, loaded.tests)
    assert timedelta(hours=1) == loaded.grants[3].max_ttl


def test_no_grants_may_be_written_and_refuse_all() -> None:
    """An empty list of grants is clear; a missing one is a file that was cut off."""
    head = POLICY[: POLICY.index("grants:")]
    assert () == load_policy(head + "grants: []\nadmins: []\ntests: []\n", "policy.yaml").grants
    assert ("policy.yaml:1: grants: this is required and missing; add it",) == refusal(head)


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        ("scopes: [charge] }", "scope: [charge] }", "15: grants[0].scope: unknown key; did you mean scopes?"),
        ("max_ttl: 1h", "maxttl: 1h", "13: audiences.mail.maxttl: unknown key; did you mean max_ttl?"),
        ("issuer:", "Issuer:", "1: Issuer: unknown key; did you mean issuer?"),
        ("from: [127", "form: [127", "20: admins[0].form: unknown key; did you mean from?"),
        ("scopes: [charge] }", "scopes: charge }", "15: grants[0].scopes: this must be a list"),
        ("scopes: [charge] }", "scopes: [] }", "15: grants[0].scopes: this must not be empty; name at least one"),
        ("scopes: [transfer]\n", "scopes: []\n", "9: audiences.bank.scopes: this must not be empty"),
        (
            "served_by: [spiffe://prod.example/ns/shop/sa/payments]",
            "served_by: []",
            "5: audiences.payments.served_by: ",
        ),
        ("from: [127.0.0.0/8, ", "from: [], x: [", "20: admins[0].from: this must not be empty"),
        ("[refund], expect", "[], expect", "23: tests[1].scopes: this must not be empty"),
        (
            "scopes: [charge] }",
            "scopes: [charge, charge] }",
            "15: grants[0].scopes: charge is listed twice; remove one",
        ),
        (
            "[charge, refund, report]",
            "[charge, refund, report, charge]",
            "6: audiences.payments.scopes: charge is listed",
        ),
        ("127.0.0.0/8,", "127.0.0.0/8, 127.0.0.0/8,", "20: admins[0].from: 127.0.0.0/8 is listed twice; remove one"),
        ("may_act: true", "may_act: 1", "17: grants[2].may_act: this must be true or false; correct it"),
        ("binding: none", "binding: off", "10: audiences.bank.binding: 'off' is not read the same everywhere"),
        (
            "binding: none",
            "binding: tls",
            "10: audiences.bank.binding: this must be 'certificate' or 'none'; correct it",
        ),
        ("expect: deny", "expect: refuse", "23: tests[1].expect: this must be 'allow' or 'deny'; correct it"),
        (", expect: deny", "", "23: tests[1].expect: this is required and missing; add it"),
    ],
)
def test_a_wrong_shape_is_refused_with_its_line(old: str, new: str, expected: str) -> None:
    """Unknown keys, wrong types, empty lists and repetitions; the closest known key is named."""
    assert refusal(changed(old, new))[0].startswith(f"policy.yaml:{expected}")


@pytest.mark.parametrize(
    ("life", "expected"),
    [
        ("0s", "'0s' is no time at all; give a duration longer than zero"),
        ("999ms", "999ms is out of bounds; give 1s to 1d"),
        ("86401s", "86401s is out of bounds; give 1s to 1d"),
        ("-1s", "'-1s' is not a duration; write a whole number and one unit: 500ms, 90s, 10m, 24h or 7d"),
        ("600", "a duration is a whole number with a unit; write for instance 500ms, 90s, 10m, 24h or 7d"),
        (".nan", "'.nan' is not read the same everywhere; quote it (or write true, false, or plain digits)"),
        ("9223372036854775808s", "'9223372036854775808s' is not a duration; write a whole number and one unit"),
    ],
)
def test_b03_a_life_is_one_second_to_one_day(life: str, expected: str) -> None:
    """A claim is in whole seconds, and longer than a day is no short-lived token."""
    assert refusal(changed("10m", life))[0].startswith(f"policy.yaml:7: audiences.payments.max_ttl: {expected}")


@pytest.mark.parametrize("life", ["1s", "24h", "1d", "1500ms"])
def test_b03_the_ends_of_the_range_are_read(life: str) -> None:
    """One second and one day belong to it."""
    assert timedelta(0) < load_policy(changed("1h", life), "policy.yaml").audiences["mail"].max_ttl


@pytest.mark.parametrize(
    "issuer",
    [
        *("http://tokens.prod.example", "https://", "https://tokens.prod.example/", "https://tokens.prod.example?a=b"),
        *(
            "https://tokens.prod.example#x",
            "https://user@tokens.prod.example",
            "tokens.prod.example",
            "HTTPS://a.example",
        ),
        *(
            "https://Tokens.prod.example",
            "https://tokens.prod.example:0",
            "https://tokens.prod.example/a//b",
            "'https://a '",
        ),
        "https://" + "a" * 250,
    ],
)
def test_an_issuer_has_one_spelling(issuer: str) -> None:
    """An https URL in lower case, with no query, fragment, user or slash at the end (RFC 8414 section 2)."""
    (line,) = refusal(changed("https://tokens.prod.example", issuer))
    assert line.startswith("policy.yaml:1: issuer: ")
    assert "is not an issuer; write one https URL" in line


@pytest.mark.parametrize(
    "issuer", ["https://a", "https://tokens.prod.example:8443", "https://tokens.example/env/Prod-1"]
)
def test_an_issuer_may_have_a_port_and_a_path(issuer: str) -> None:
    """The twins of the refused ones."""
    assert issuer == load_policy(changed("https://tokens.prod.example", issuer), "policy.yaml").issuer


@pytest.mark.parametrize(
    "domain", ["Prod.example", "spiffe://prod.example", "prod.example/x", "'*'", "''", "prod example"]
)
def test_a_trust_domain_is_a_name_alone(domain: str) -> None:
    """As in a SPIFFE ID (section 2.1), without the scheme."""
    lines = refusal(changed("trust_domain: prod.example", f"trust_domain: {domain}"))
    assert (
        f"policy.yaml:2: trust_domain: {domain.strip(chr(39))!r} is not a trust domain; write its name alone"
        in lines[0]
    )


@pytest.mark.parametrize(
    "name",
    [
        *(
            "svc-*",
            "svc-",
            ".svc",
            "a b",
            "a|b",
            "[a]",
            "(a)",
            "a+",
            "a?",
            "a%62",
            "a\\\\b",
            "b\u00e4nk",
            "\u0431ank",
            "",
        ),
        *("a\\n", "a\\u0000", "a,b", "a" * 256),
    ],
)
def test_b02_an_audience_cannot_look_like_a_pattern(name: str) -> None:
    """Letters, digits and ``. _ : / @ -`` between two letters or digits: nothing that is special anywhere else."""
    lines = refusal(changed("  mail:\n", f'  "{name}":\n').replace("audience: mail", f'audience: "{name}"'))
    assert "is not an audience; write at most 255 letters, digits and . _ : / @ -" in lines[0]
    assert {"11", "18"} == {line.split(":")[1] for line in lines}


@pytest.mark.parametrize("name", ["a", "A1", "https://api.bank.example/v1", "svc.ns:8443", "ops@bank_2", "a" * 255])
def test_b02_an_audience_may_be_a_word_a_host_or_a_url(name: str) -> None:
    """The twins of the refused ones."""
    text = changed("  mail:\n", f"  {name}:\n").replace("audience: mail", f"audience: {name}")
    granted(load_policy(text, "policy.yaml").decide(ORDERS, name, ["send"]))


@pytest.mark.parametrize("scope", ["a b", "a\\\\b", '\\"', "\\n", "", "\u00e4", "a" * 129])
def test_b01_a_scope_is_a_scope_token(scope: str) -> None:
    """RFC 6749 section 3.3: printable ASCII without space, quote and backslash; at most 128 signs."""
    (line,) = refusal(changed("scopes: [charge] }", f'scopes: ["{scope}"] }}'))
    assert line.startswith("policy.yaml:15: grants[0].scopes[0]: ")
    assert "is not a scope-token (RFC 6749 section 3.3); write 1 to 128" in line


def test_b01_the_scopes_of_an_audience_fit_into_a_token() -> None:
    """Sixty-four scopes and 2,048 signs are read, one more of either is not: a token that asks for all must exist."""
    for number, length in ((64, 31), (15, 128)):
        scopes = [f"{position:x<{length}}" for position in range(number)]
        load_policy(changed("scopes: [send]\n", f"scopes: [send, {', '.join(scopes[1:])}]\n"), "policy.yaml")
    for number, length in ((65, 3), (64, 32), (16, 128)):
        scopes = [f"{position:x<{length}}" for position in range(number)]
        (line,) = refusal(
            changed("scopes: [send]\n", f"scopes: [{', '.join(scopes)}]\n").replace(f"  - {MAIL_GRANT}\n", "")
        )
        assert line.startswith(f"policy.yaml:12: audiences.mail.scopes: {number} scopes of ")
        assert line.endswith(
            "signs together do not fit into a token; give at most 64 scopes of 2048 signs, or divide the audience"
        )


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        (
            "workload: spiffe://prod.example/ns/shop/**",
            "workload: spiffe://prod.example/ns/sh*",
            (
                "18: grants[3].workload: SPIFFE ID pattern 'spiffe://prod.example/ns/sh*' has an invalid path segment"
                " 'sh*' (a plain segment, '*', or '**' as the last one); write for instance spiffe://prod.example/ns/shop/sa/*"
            ),
        ),
        (
            "workload: spiffe://prod.example/ns/ops/sa/breakglass",
            "workload: spiffe://prod.example/ns/ops/sa/*",
            (
                "20: admins[0].workload: SPIFFE ID 'spiffe://prod.example/ns/ops/sa/*' has an invalid path segment '*';"
                " write the whole name of one workload, for instance spiffe://prod.example/ns/a/sa/b"
            ),
        ),
        (
            "workload: spiffe://prod.example/ns/ops/sa/breakglass",
            "workload: 5",
            "20: admins[0].workload: this must be text (in quotes where it looks like a number); correct it",
        ),
        (
            "127.0.0.0/8",
            "127.0.0.1/8",
            (
                "20: admins[0].from[0]: '127.0.0.1/8' is not a network; write an address and a prefix length with all"
                " bits after it zero; did you mean 127.0.0.0/8?"
            ),
        ),
        (
            "127.0.0.0/8",
            "localhost",
            (
                "20: admins[0].from[0]: 'localhost' is not a network; write an address and a prefix length with all"
                " bits after it zero, for instance 127.0.0.0/8 or ::1/128"
            ),
        ),
        (
            "127.0.0.0/8",
            "12",
            "20: admins[0].from[0]: this must be text (in quotes where it looks like a number); correct it",
        ),
    ],
)
def test_a_wrong_name_is_refused_with_an_example_of_a_right_one(old: str, new: str, expected: str) -> None:
    """Patterns in grants, whole names for admins, networks."""
    assert (f"policy.yaml:{expected}",) == refusal(changed(old, new))


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        (
            "audience: bank",
            "audience: banq",
            "17: grants[2].audience: there is no audience banq; did you mean bank?",
        ),
        (
            "audience: bank",
            "audience: zzz",
            "17: grants[2].audience: there is no audience zzz; add it to the audiences, or remove it here",
        ),
        (
            "scopes: [charge] }",
            "scopes: [charge, refnd] }",
            "15: grants[0].scopes[1]: payments has no scope refnd; did you mean refund?",
        ),
        (
            "scopes: [charge] }",
            "scopes: [Charge] }",
            "15: grants[0].scopes[0]: payments has no scope Charge; did you mean charge?",
        ),
        (
            "workload: spiffe://prod.example/ns/shop/**",
            "workload: spiffe://staging.example/**",
            (
                "18: grants[3].workload: staging.example is not the trust domain of this policy; name a workload of"
                " prod.example"
            ),
        ),
        (
            "served_by: [spiffe://prod.example",
            "served_by: [spiffe://staging.example",
            (
                "5: audiences.payments.served_by[0]: staging.example is not the trust domain of this policy; name a"
                " workload of prod.example"
            ),
        ),
        (
            "spiffe://prod.example/ns/ops",
            "spiffe://staging.example/ns/ops",
            (
                "20: admins[0].workload: staging.example is not the trust domain of this policy; name a workload of"
                " prod.example"
            ),
        ),
        (
            "max_ttl: 1m",
            "max_ttl: 601s",
            "16: grants[1].max_ttl: this is longer than the 10m of its audience; a grant can only shorten it",
        ),
        (
            f"  - {MAIL_GRANT}",
            f"  - {MAIL_GRANT}\n  - {ORDERS_GRANT}",
            "19: grants[4].scopes[0]: grants[0] on line 15 gives the same workload charge already; remove one",
        ),
        (
            '"::1/128"] }',
            '"::1/128"] }\n  - workload: spiffe://prod.example/ns/ops/sa/breakglass',
            "21: admins[1].workload: admins[0] on line 20 is the same workload; put them together",
        ),
        (
            "scopes: [refund], expect: deny",
            "scopes: [refnd], expect: deny",
            "23: tests[1].scopes[0]: payments has no scope refnd; did you mean refund?",
        ),
        (
            "audience: payments, scopes: [refund]",
            "audience: paymnts, scopes: [refund]",
            "23: tests[1].audience: there is no audience paymnts; did you mean payments?",
        ),
        (
            "spiffe://prod.example/ns/shop/sa/orders, audience: payments, scopes: [refund]",
            "spiffe://prod.exmaple/ns/shop/sa/orders, audience: payments, scopes: [refund]",
            (
                "23: tests[1].workload: prod.exmaple is not the trust domain of this policy; name a workload of"
                " prod.example"
            ),
        ),
    ],
)
def test_b12_parts_that_do_not_fit_together_are_refused(old: str, new: str, expected: str) -> None:
    """Names that do not exist, other trust domains, contradictions; a test of what does not exist proves nothing."""
    assert (f"policy.yaml:{expected}",) == refusal(changed(old, new))


def test_a_grant_may_be_as_long_as_its_audience() -> None:
    """The twin of the one that is longer by a second."""
    assert (
        timedelta(minutes=10) == load_policy(changed("max_ttl: 1m", "max_ttl: 600s"), "policy.yaml").grants[1].max_ttl
    )


def test_the_same_workload_may_have_another_scope_in_another_grant() -> None:
    """The twin of the refused repetition: the two add up."""
    text = changed(f"  - {MAIL_GRANT}", f"  - {MAIL_GRANT}\n  - {ORDERS_GRANT.replace('charge', 'refund')}")
    loaded = compile_policy(text, "policy.yaml")
    assert ("charge", "refund", "report") == granted(loaded.decide(ORDERS, "payments")).scopes


def test_b12_a_policy_that_fails_its_own_test_is_refused() -> None:
    """The line of the test, what it expects, what was decided, and why."""
    text = changed("scopes: [charge] }", "scopes: [charge, refund] }").replace(
        "[charge], expect: allow", "[charge], expect: deny"
    )
    with pytest.raises(PolicyTestError) as refused:
        load_policy(text, "policy.yaml")
    assert (
        (
            "policy.yaml:22: tests[0]: expected deny, and allowed: policy.yaml:15: grants[0] gives"
            " spiffe://prod.example/ns/shop/sa/orders the scopes charge of payments, for at most 10m, bound to the"
            " caller's certificate; correct the policy, or the test if it is the one that is wrong"
        ),
        (
            "policy.yaml:23: tests[1]: expected deny, and allowed: policy.yaml:15: grants[0] gives"
            " spiffe://prod.example/ns/shop/sa/orders the scopes refund of payments, for at most 10m, bound to the"
            " caller's certificate; correct the policy, or the test if it is the one that is wrong"
        ),
    ) == refused.value.lines


def test_b12_a_test_that_expects_a_yes_fails_with_what_is_missing() -> None:
    """The explanation says what would have allowed it."""
    (line,) = refusal(changed("[refund], expect: deny", "[refund], expect: allow"))
    assert line.startswith(
        "policy.yaml:23: tests[1]: expected allow, and denied: spiffe://prod.example/ns/shop/sa/orders has a grant of"
        " payments, but not with refund; policy.yaml:15: grants[0] gives charge; "
    )


def test_a_test_without_scopes_asks_for_any() -> None:
    """It says whether the workload may call the audience at all."""
    loaded = load_policy(changed(", scopes: [charge], expect: allow", ", expect: allow"), "policy.yaml")
    assert [True, True] == [result.passed for result in run_tests(loaded)]


def test_tests_can_be_run_without_refusing_the_policy() -> None:
    """For the command that shows them."""
    results = run_tests(compile_policy(changed("expect: deny", "expect: allow"), "policy.yaml"))
    assert [True, False] == [result.passed for result in results]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", "policy.yaml:1: the file is empty"),
        (b"", "policy.yaml:1: the file is empty"),
        ("# nothing\n", "policy.yaml:1: the file is empty"),
        ("{}", "policy.yaml:1: audiences: this is required and missing; add it"),
        ("[]", "policy.yaml:1: this must be a mapping (key: value); correct it"),
        ("allow all", "policy.yaml:1: this must be a mapping (key: value); correct it"),
        ("issuer: [\n", "policy.yaml:1: this is not YAML"),
        (b"\xff\xfe", "policy.yaml:1: this is not UTF-8; save the file as UTF-8"),
        ("x" * (32 * 1024 * 1024 + 1), "policy.yaml:1: the file is larger than 33554432 bytes; make it smaller"),
    ],
)
def test_b12_a_file_that_is_no_policy_is_refused(text: str | bytes, expected: str) -> None:
    """Empty, broken, or something else."""
    assert refusal(text)[0].startswith(expected)


def test_an_audience_has_to_be_named() -> None:
    """A policy for nothing is a mistake."""
    text = "issuer: https://a.example\ntrust_domain: a.example\naudiences: {}\ngrants: []\n"
    assert refusal(text)[0].startswith("policy.yaml:3: audiences: this must not be empty; name at least one")


def test_all_problems_are_collected_and_the_first_is_the_message() -> None:
    """A policy error is a config error: one line, and the others at hand."""
    text = changed("max_ttl: 10m", "max_ttl: 25h").replace("expect: deny", "expect: no-way")
    with pytest.raises(ConfigError) as refused:
        load_policy(text, "policy.yaml")
    assert "policy.yaml:7: audiences.payments.max_ttl: 25h is out of bounds; give 1s to 1d (and 1 more)" == str(
        refused.value
    )
