"""The configuration: its defaults, and that each mistake is named with file, line, what is wrong and what to do."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path
from typing import Any

import pydantic
import pytest
import yaml

from carnet.errors import ConfigError
from carnet_broker.config import BrokerConfig, host_and_port, load_config
from carnet_broker.core.keyring import Timing
from carnet_broker.core.marked_yaml import DocumentError, Section
from carnet_broker.core.minting import MintingRules
from carnet_broker.core.workload import LeafRules
from carnet_broker.loading import load_policy_file
from support import policies

SMALLEST = """\
issuer: https://tokens.prod.example
policy_file: policy.yaml
tls:
  certificate_file: broker.pem
  key_file: broker-key.pem
  client_ca_file: ca.pem
vault:
  address: https://vault.example:8200
  role_id_file: role-id
  secret_id_file: secret-id
  environment: prod
store:
  url: sqlite:////var/lib/carnet/store.db
audit:
  directory: audit
"""


def load(directory: Path, text: str = SMALLEST) -> BrokerConfig:
    """Load a configuration from a file of `directory`."""
    file = directory / "broker.yaml"
    file.write_text(text)
    return load_config(file)


def with_(directory: Path, section: str, **values: Any) -> BrokerConfig:  # noqa: ANN401 - of any kind, also wrong ones
    """Load the smallest configuration with values set in one section ("" is the top)."""
    content = yaml.safe_load(SMALLEST)
    (content.setdefault(section, {}) if section else content).update(values)
    return load(directory, yaml.safe_dump(content))


def complaint(directory: Path, text: str) -> str:
    """Return the first problem of a configuration that must be refused, without the name of its directory."""
    with pytest.raises(DocumentError) as caught:
        load(directory, text)
    return str(caught.value).removeprefix(f"{directory}/").removesuffix(" (and 1 more)")


def test_the_smallest_file_is_enough_and_its_defaults_are_those_of_the_design(tmp_path):
    """Where to listen, how long things live, and what one peer may ask for."""
    config = load(tmp_path)
    assert ("127.0.0.1:8443", "127.0.0.1:8444", "127.0.0.1:8080") == (
        config.listen.tokens,
        config.listen.trust,
        config.listen.plain,
    )
    assert Timing() == config.timing()
    rules = MintingRules(issuer=config.issuer)
    lives = config.tokens
    assert (rules.default_life, rules.longest_life, rules.shortest_life) == (
        lives.default_life,
        lives.longest_life,
        lives.shortest_life,
    )
    assert (LeafRules().max_life, ()) == (config.tls.max_leaf_life, config.tls.crl_files)
    assert ("kv", "fsync", "info", "json") == (
        config.keys.store,
        config.audit.durability,
        config.log.level,
        config.log.format,
    )
    assert timedelta(seconds=60) == config.keys.confirm_within
    assert (timedelta(seconds=15), timedelta(minutes=5)) == (config.trust.heartbeat, config.trust.max_staleness)
    store = config.store
    assert (1, 15, 5, 200) == (
        store.poll_interval.total_seconds(),
        store.lease.total_seconds(),
        store.timeout.total_seconds(),
        store.verifier_sessions,
    )
    assert ("127.0.0.1:8445", False) == (config.listen.admin, config.listen.admin_beyond_loopback)
    vault = config.vault
    assert ("carnet", "transit", "approle", None, None, None) == (
        vault.kv_mount,
        vault.transit_mount,
        vault.approle_mount,
        vault.transit_key,
        vault.namespace,
        vault.ca_file,
    )


def test_relative_paths_count_from_the_directory_of_the_file(tmp_path):
    """Wherever the broker is started; an absolute path stays."""
    text = SMALLEST.replace("ca.pem", "/etc/ca.pem").replace(
        "  certificate_file", "  crl_files: [crl.pem, ../other/crl.pem]\n  certificate_file"
    )
    config = load(tmp_path, text)
    assert (tmp_path / "policy.yaml", tmp_path / "audit") == (config.policy_file, config.audit.directory)
    assert (tmp_path / "broker.pem", Path("/etc/ca.pem")) == (config.tls.certificate_file, config.tls.client_ca_file)
    assert (tmp_path / "crl.pem", tmp_path / "../other/crl.pem") == config.tls.crl_files
    assert (tmp_path / "role-id", tmp_path / "secret-id") == (config.vault.role_id_file, config.vault.secret_id_file)
    assert config.vault.ca_file is None
    assert tmp_path / "vault-ca.pem" == with_(tmp_path, "vault", ca_file="vault-ca.pem").vault.ca_file


def test_what_was_read_cannot_be_changed(tmp_path):
    """The configuration is one for the life of the process."""
    with pytest.raises(pydantic.ValidationError, match="frozen"):
        load(tmp_path).issuer = "https://other.example"


# -- what is refused ---------------------------------------------------------------------------------------------------


def test_a_file_that_cannot_be_read_is_named_with_the_option_that_names_it(tmp_path):
    """No traceback."""
    with pytest.raises(
        ConfigError, match=r"missing\.yaml: cannot be read \(No such file or directory\); .* --config FILE"
    ):
        load_config(tmp_path / "missing.yaml")
    with pytest.raises(ConfigError, match=r"cannot be read \(Is a directory\)"):
        load_config(tmp_path)


@pytest.mark.parametrize(
    "text", ["", "\n", "# nothing\n", "- a list\n", "text\n", "issuer: [\n", "issuer: x\nissuer: y\n"]
)
def test_a_file_that_is_no_mapping_is_refused(tmp_path, text):
    """With its name and a line."""
    assert complaint(tmp_path, text).startswith("broker.yaml:")


def required() -> list[tuple[str, str]]:
    """Each line of the smallest file that cannot be left out, and the path that is then missing."""
    found, section = [], ""
    for line in SMALLEST.splitlines():
        key = line.strip().partition(":")[0]
        if not line.startswith(" "):
            section = key if line.endswith(":") else ""
        if not line.endswith(":"):
            found.append((line, f"{section}.{key}" if section else key))
    return found


@pytest.mark.parametrize(("line", "path"), required(), ids=[path for _, path in required()])
def test_what_is_required_and_missing_is_named(tmp_path, line, path):
    """By its whole path, and the line of the section that lacks it."""
    section = path.partition(".")[0] if "." in path else ""
    lines = [one for one in SMALLEST.splitlines() if one != line]
    if section in {"audit", "store"}:  # Its only key: a section without one is another mistake.
        lines[lines.index(f"{section}:")] = f"{section}: {{}}"
    at = next((n for n, one in enumerate(lines, 1) if section and one.startswith(section)), 1)
    text = complaint(tmp_path, "\n".join(lines))
    assert f"broker.yaml:{at}: {path}: this is required and missing; add it" == text


def sections(model: type[Section] = BrokerConfig, path: str = "") -> list[tuple[str, str]]:
    """Every section, and one of its keys."""
    found = [(path, next(iter(model.model_fields)))]
    for name, field in model.model_fields.items():
        kind = field.annotation
        if isinstance(kind, type) and issubclass(kind, Section):
            found += sections(kind, f"{path}.{name}" if path else name)
    return found


@pytest.mark.parametrize(("section", "known"), sections())
def test_an_unknown_key_is_refused_in_every_section_with_its_line(tmp_path, section, known):
    """A slip of the finger is no default; what was meant is guessed, and the known keys are listed."""
    content = yaml.safe_load(SMALLEST)
    (content.setdefault(section, {}) if section else content)[f"{known}x"] = 1
    text = yaml.safe_dump(content, sort_keys=False)
    line = next(n for n, one in enumerate(text.splitlines(), 1) if one.strip().startswith(f"{known}x"))
    name = f"{section}.{known}x" if section else f"{known}x"
    assert f"broker.yaml:{line}: {name}: unknown key; did you mean {known}? the keys here are" in complaint(
        tmp_path, text
    )


WRONG = [
    ("", "issuer", ["http://tokens.prod.example", "tokens", "https://a b", "", 5, None, "https://" + "a" * 250]),
    ("", "policy_file", [5, True, ["policy.yaml"]]),
    ("", "tls", ["broker.pem", 5, []]),
    ("tls", "crl_files", ["crl.pem", [5]]),
    ("tls", "max_leaf_life", ["90", 90, "0d", "-1d", "forever", "1h30m", ""]),
    ("vault", "address", ["vault.example:8200", "http://vault.example:8200", "ftp://vault.example", "", 8200]),
    (
        "vault",
        "address",
        [
            "http://127.0.0.1.example:8200",
            "http://localhost.example",
            "http://localhost@vault.example",
            "http://127.0.0.1:80@vault.example",
            "http://[::1].example",
            "https://",
        ],
    ),
    ("vault", "timeout", [5, "0s"]),
    ("vault", "poll_interval", ["0s", 0, None]),
    ("vault", "environment", [5, None]),
    ("keys", "store", ["file", "KV", "", None]),
    ("keys", "poller_interval", ["-1s", 5, 0.0, False, "none", None, "0m"]),
    ("keys", "skew", [True, 1, "0 s"]),
    ("keys", "leeway", [[], {}]),
    ("keys", "min_interval", [False, "1"]),
    ("keys", "max_age", [0, "0", "0s"]),
    ("keys", "island", [0, "1w"]),
    ("tokens", "default_life", [300, "5 m"]),
    ("audit", "directory", [5]),
    ("audit", "durability", ["none", "FSYNC", False]),
    ("limits", "tokens_per_second", [0, -1, "200", 1.5, True]),
    ("limits", "token_burst", [0]),
    ("limits", "key_sets_per_second", [0]),
    ("limits", "drain", ["0s"]),
    ("limits", "handshake_timeout", ["0s", "100ms", "500ms"]),
    ("log", "level", ["trace", "INFO", 10]),
    ("log", "format", ["xml"]),
    ("listen", "tokens", ["8443", "127.0.0.1", ":8443", "127.0.0.1:", "127.0.0.1:65536", "127.0.0.1:-1", 8443]),
    (
        "listen",
        "tokens",
        ["::1:8443", "[::1:8443", "::1]:8443", "[127.0.0.1]:8443", "a b:80", "h:٣", "http://h:80", "h:000080"],
    ),
    ("listen", "admin", ["0.0.0.0:8445", "10.0.0.1:8445", "broker.example:8445", "[::]:8445"]),
    (
        "store",
        "url",
        ["sqlite:///relative.db", "sqlite://", "mysql://user@host/db", "store.db", "", 5, "postgresql:/"],
    ),
    ("store", "lease", ["0s", 15]),
    ("store", "verifier_sessions", [0]),
    ("trust", "heartbeat", ["0s", 15]),
    ("listen", "plain", ["8.8.8.8:8080", "[2001:4860::1]:8080", "broker.example:8080"]),
]


@pytest.mark.parametrize(
    ("section", "key", "value"),
    [(section, key, value) for section, key, values in WRONG for value in values],
    ids=lambda value: str(value)[:40] or "empty",
)
def test_a_wrong_value_is_refused_with_its_line_and_what_to_do(tmp_path, section, key, value):
    """Each field by its whole path; the text says what is wrong, and after a semicolon what to write."""
    content = yaml.safe_load(SMALLEST)
    (content.setdefault(section, {}) if section else content)[key] = value
    text = yaml.safe_dump(content, sort_keys=False, allow_unicode=True)
    lines = text.splitlines()
    at = next(n for n, one in enumerate(lines, 1) if one.startswith(f"{'  ' if section else ''}{key}:"))
    told = complaint(tmp_path, text)
    where, _, what = told.partition(": ")
    file, _, line = where.partition(":")
    assert "broker.yaml" == file
    # A rule over a whole section stands on the line of the section, and names the field in its text.
    item_at = at + 1 if isinstance(value, list) else at
    assert int(line) in {at, item_at, lines.index(f"{section}:") + 1 if section else at}
    path, _, words = what.partition(": ")
    assert (section or key) in path
    assert key in what
    assert ";" in words


ZERO = [0, "0"]


@pytest.mark.parametrize("field", ["poller_interval", "skew", "leeway", "min_interval", "acknowledge_within"])
@pytest.mark.parametrize("zero", ZERO)
def test_what_may_be_nothing_may_be_zero(tmp_path, field, zero):
    """As a number or as text: no pollers, no skew, no leeway, no pause between rotations."""
    config = with_(tmp_path, "keys", **{field: zero})
    assert timedelta(0) == getattr(config.timing(), field)


def test_every_duration_of_the_keyring_comes_from_its_own_setting(tmp_path):
    """None is forgotten, and none taken for another."""
    keys = {
        "max_age": "1s",
        "poller_interval": "2s",
        "replica_lag": "30s",
        "skew": "4s",
        "leeway": "5s",
        "island": "6s",
        "sign_for": "7d",
        "rotate_every": "8h",
        "min_interval": "9s",
        "acknowledge_within": "11s",
    }
    text = SMALLEST + yaml.safe_dump({"keys": keys, "tokens": {"longest_life": "10m"}})
    expected = Timing(
        max_age=timedelta(seconds=1),
        poller_interval=timedelta(seconds=2),
        replica_lag=timedelta(seconds=30),
        skew=timedelta(seconds=4),
        leeway=timedelta(seconds=5),
        longest_life=timedelta(minutes=10),
        island=timedelta(seconds=6),
        sign_for=timedelta(days=7),
        rotate_every=timedelta(hours=8),
        min_interval=timedelta(seconds=9),
        acknowledge_within=timedelta(seconds=11),
    )
    assert expected == load(tmp_path, text).timing()


@pytest.mark.parametrize(
    ("sections_", "words"),
    [
        ({"tokens": {"default_life": "2h"}}, "shortest_life <= default_life <= longest_life"),
        ({"tokens": {"default_life": "10s"}}, "shortest_life <= default_life <= longest_life"),
        ({"tokens": {"shortest_life": "6m"}}, "shortest_life <= default_life <= longest_life"),
        ({"vault": {"poll_interval": "16s"}}, "vault.poll_interval must not be longer than keys.replica_lag"),
        ({"keys": {"replica_lag": "4s"}}, "vault.poll_interval must not be longer than keys.replica_lag"),
        ({"keys": {"sign_for": "1d"}}, "sign_for must be longer than rotate_every"),
        ({"keys": {"rotate_every": "7d"}}, "sign_for must be longer than rotate_every"),
        ({"keys": {"poller_interval": "6d"}}, "sign_for must be longer than rotate_every"),
        ({"keys": {"acknowledge_within": "6d"}}, "sign_for must be longer than rotate_every"),
        ({"trust": {"max_staleness": "20s"}}, "trust.max_staleness must be at least twice trust.heartbeat"),
        ({"store": {"lease": "2s"}}, "store.lease must be at least three times store.poll_interval"),
        ({"keys": {"island": "8d"}}, "island must not be longer than sign_for"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(tmp_path, sections_, words):
    """Before anything is served, with both names."""
    content = yaml.safe_load(SMALLEST)
    for name, values in sections_.items():
        content[name] = content.get(name, {}) | values
    told = complaint(tmp_path, yaml.safe_dump(content, sort_keys=False))
    assert told.startswith("broker.yaml:")
    assert words in told


@pytest.mark.parametrize(
    "values",
    [
        {"poll_interval": "15s"},
        {"address": "http://127.0.0.1:8200"},
        {"address": "http://localhost:8200"},
        {"address": "http://[::1]:8200"},
        {"address": "http://127.0.0.1"},
        {"transit_key": "carnet-prod", "namespace": "team"},
    ],
)
def test_what_is_just_inside_is_accepted(tmp_path, values):
    """The twins of what is refused."""
    config = with_(tmp_path, "vault", **values)
    assert values == {name: value for name, value in yaml.safe_load(_dumped(config)).items() if name in values}


def _dumped(config: BrokerConfig) -> str:
    vault = config.vault
    return yaml.safe_dump(
        {
            "poll_interval": f"{int(vault.poll_interval.total_seconds())}s",
            "address": vault.address,
            "transit_key": vault.transit_key,
            "namespace": vault.namespace,
        }
    )


@pytest.mark.parametrize(
    ("address", "expected"),
    [
        ("192.0.2.1:8443", ("192.0.2.1", 8443)),
        ("[::1]:8443", ("::1", 8443)),
        ("[::]:0", ("::", 0)),
        ("localhost:65535", ("localhost", 65_535)),
        ("broker.carnet.svc:0", ("broker.carnet.svc", 0)),
    ],
)
def test_an_address_is_a_host_and_a_port(tmp_path, address, expected):
    """IPv6 in brackets; port 0 is any free one."""
    config = with_(tmp_path, "listen", tokens=address)
    assert expected == host_and_port(config.listen.tokens)


@pytest.mark.parametrize(
    "address",
    ["127.0.0.1:0", "localhost:0", "10.1.2.3:0", "192.168.0.1:0", "[fd00::1]:0", "[::1]:0", "0.0.0.0:0", "[::]:0"],
)
def test_the_plain_port_is_for_this_host_or_the_pod_network(tmp_path, address):
    """It has no TLS; a public address is refused (above)."""
    assert address == with_(tmp_path, "listen", plain=address).listen.plain


@pytest.mark.parametrize("accepted", ["https://t", "https://tokens.prod.example/path?x=1"])
def test_an_issuer_is_an_https_url(tmp_path, accepted):
    """Of 255 characters at most; compared whole by everybody."""
    assert accepted == with_(tmp_path, "", issuer=accepted).issuer


# -- the policy beside it ----------------------------------------------------------------------------------------------


def policy_complaint(directory: Path, policy: str, **tokens: str) -> str:
    """Return why a broker with these lives does not take up `policy`."""
    config = with_(directory, "tokens", **tokens)
    config.policy_file.write_text(policy)
    with pytest.raises(ConfigError) as caught:
        load_policy_file(config)
    return str(caught.value).removeprefix(f"{directory}/")


def test_a_policy_is_taken_up_whose_limits_this_broker_can_keep(tmp_path):
    """The twin of what follows: at both bounds."""
    config = with_(tmp_path, "tokens", longest_life="1h", shortest_life="1m")
    config.policy_file.write_text(policies.POLICY)
    assert config.issuer == load_policy_file(config).issuer


def test_a_limit_of_the_policy_that_this_broker_would_not_keep_is_refused(tmp_path):
    """The longest life is what verifiers and the keyring count on."""
    told = policy_complaint(tmp_path, policies.POLICY, longest_life="59m")
    assert told.startswith("policy.yaml:11: audiences.mail: max_ttl 1h is longer than tokens.longest_life 59m")


def test_a_limit_of_the_policy_by_which_nobody_would_get_a_token_is_refused(tmp_path):
    """A life below the shortest is refused at each call; so it is said at the start."""
    told = policy_complaint(tmp_path, policies.POLICY, shortest_life="61s")
    assert told.startswith("policy.yaml:16: grants[1]: max_ttl 1m is shorter than tokens.shortest_life 61s")
    short = policies.changed("max_ttl: 10m", "max_ttl: 29s")
    told = policy_complaint(tmp_path, short[: short.index("tests:")].replace(", max_ttl: 1m", ""))
    assert told.startswith("policy.yaml:4: audiences.payments: max_ttl 29s is shorter than tokens.shortest_life 30s")


def test_j25_a_policy_of_another_environment_is_refused(tmp_path):
    """A broker of production never issues by the policy of staging."""
    text = policies.changed("https://tokens.prod.example", "https://tokens.staging.example")
    assert "policy.yaml: the policy is for issuer https://tokens.staging.example" in policy_complaint(tmp_path, text)


@pytest.mark.parametrize("address", ["0.0.0.0:8445", "10.0.0.1:8445", "[::]:8445"])
def test_the_admin_port_goes_beyond_loopback_only_where_that_is_said(tmp_path, address):
    """Its flag says that whoever wrote it meant it."""
    config = with_(tmp_path, "listen", admin=address, admin_beyond_loopback=True)
    assert address == config.listen.admin
    assert "localhost:1" == with_(tmp_path, "listen", admin="localhost:1").listen.admin


@pytest.mark.parametrize(
    "url", ["sqlite:////var/lib/carnet/store.db", "postgresql://carnet@db.prod.example:5432/carnet", "postgres://h/d"]
)
def test_both_kinds_of_store_can_be_named(tmp_path, url):
    """A file of this host, or a database for several."""
    assert url == with_(tmp_path, "store", url=url).store.url


def test_the_url_of_a_store_that_is_refused_is_not_shown(tmp_path):
    """It may hold a password."""
    text = SMALLEST.replace("sqlite:////var/lib/carnet/store.db", "mysql://carnet:hunter2@db/carnet")
    assert "hunter2" not in complaint(tmp_path, text)
