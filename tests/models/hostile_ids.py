"""Model ids that try to lead out of the allowed folders, or to a file that is no model."""

from pathlib import Path


def hostile_ids(root: Path, outside: Path) -> list[str]:
    """Return 200 ids or more; `outside` is a good model beside the allowed `root`.

    In the root there have to be links `link` to `outside` and `loop` to itself, and a file `file`.
    """
    name, up = outside.name, f"{root}/../{outside.name}"
    targets = [str(outside), up, f"{root}/./../{name}", f"{root}//..//{name}", f"{root}/x/../../{name}"]
    targets += [
        f"/{outside}",
        f"//{outside}",
        f"{outside}/",
        f"{outside}/.",
        f"{outside}//",
        f"{up}/",
        f"{up}/.",
    ]
    targets += [f"{root}/link", f"{root}/link/", f"{root}/link/.", f"{root}/link/../{name}", f"{root}/loop"]
    targets += [f"{root}/loop/x", f"{root}/file", f"{root}/file/", f"{root}/file/..", str(root.parent), "/"]
    targets += [
        f"{root}{suffix}" for suffix in ("x", "-other", "/..", "/../..", "/../../..", "\\..\\" + name)
    ]
    targets += [f"/proc/self/root{outside}", "/proc/self/cwd", "/proc/self/fd/0", "/dev/zero", "/dev/stdin"]
    targets += [
        "/etc",
        "/etc/passwd",
        "/root",
        "/root/.ssh",
        "/home",
        "/tmp",
        "/var/lib",
        "/sys",
        "/proc/1/environ",
    ]
    relative = [
        ".",
        "..",
        "./",
        "../",
        "../..",
        "../../etc",
        f"../{name}",
        f"./{name}",
        "~",
        "~/",
        "~root",
        "~root/x",
    ]
    relative += [
        f"azu/../{name}",
        "azu/..",
        "azu/.",
        "azu/",
        "azu//tiny-dense",
        "azu/tiny-dense/",
        "azu/tiny-dense/..",
    ]
    relative += [
        "azu/../azu/tiny-dense",
        "azu/tiny-dense/../tiny-moe",
        "azu\\tiny-dense",
        "AZU/../etc",
        "azu/%2e%2e",
    ]
    relative += [
        "azu/tiny-dense\0",
        "azu/tiny-dense\n",
        "azu/tiny-dense ",
        " azu/tiny-dense",
        "azu/tiny_dense",
    ]
    relative += [
        "a/../b",
        "a/..",
        "../a",
        "a/./b",
        "a//b",
        "/a",
        "a/",
        "a/b/c",
        "a/b/../../etc",
        "..a/b",
        "a/..b",
    ]
    relative += [
        "a--b/c",
        "a/b--c",
        "-a/b",
        "a/-b",
        ".a/b",
        "a/.b",
        "a./b",
        "a/b.",
        "a..b/c",
        "a/b..c",
        "a/b.git",
    ]
    schemes = [
        "file://",
        "file:///",
        "http://",
        "https://",
        "hf://",
        "s3://",
        "ftp://",
        "data:,",
        "git+ssh://",
    ]
    urls = [
        f"{scheme}{rest}" for scheme in schemes for rest in ("etc/passwd", "127.0.0.1:6379/x", str(outside))
    ]
    characters = [
        "\0",
        "\n",
        "\r\n",
        "\t",
        "\x1b[2J",
        "\u202e",
        "\u2028",
        "\ufeff",
        "\u2215",
        "\uff0f",
        "\u2024" * 2,
    ]
    written = [f"a{character}/b" for character in characters] + [
        f"azu/{character}" for character in characters
    ]
    written += [f"{outside}{character}" for character in characters]
    shells = [
        "$HOME",
        "${HOME}/x",
        "$(id)",
        "`id`",
        "a;id",
        "a|id",
        "a&&id",
        "*",
        "?",
        "[a-z]*",
        "a b",
        "'",
        '"',
        "<x>",
    ]
    encoded = [
        "%2e%2e%2fetc",
        "..%2f..%2fetc",
        "%00",
        "..%c0%af..",
        "..%255c",
        "\\\\host\\share",
        "C:\\",
        "C:/x",
        "NUL",
    ]
    long = [
        "a" * 513,
        "a/" * 300,
        "/" * 400,
        "../" * 200 + "etc",
        "a/" + "b" * 300,
        "😀" * 200,
        "a" * 97 + "/b",
    ]
    system = ["/etc/passwd", "/etc/shadow", "/root/.ssh/id_rsa", "/proc/self/environ", "/run/docker.sock"]
    ways = [
        f"{root}/../../../../../..",
        f"{root}/link/../..",
        "azu/tiny-dense/../../..",
        "x/../../../..",
        str(root),
    ]
    climbs = [way + target for way in ways for target in system]
    return [*targets, *relative, *urls, *written, *shells, *encoded, *long, *climbs, ""]
