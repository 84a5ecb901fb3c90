//! `capture`, with a script in Python's place.

use std::os::unix::fs::PermissionsExt as _;

use tempfile::TempDir;

use crate::{rannc, text, write};

/// A folder with a program `python` that has or lacks the package, and prints how it is called.
fn folder_with_python(has_package: bool, code: u8) -> TempDir {
    let folder = tempfile::tempdir().expect("there is a folder for temporary files");
    let find = u8::from(!has_package);
    let script = format!(
        "#!/bin/sh\nif [ \"$1\" = -c ]; then exit {find}; fi\necho \"$@\"\necho problem >&2\nexit {code}\n"
    );
    write(&folder, "python", &script);
    let path = folder.path().join("python");
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o755))
        .expect("the file was just written");
    folder
}

const CAPTURE: [&str; 6] =
    ["capture", "model.py:build", "-o", "graph.json", "--python", "./python"];

#[test]
fn python_is_called_and_its_answer_passed_on() {
    for code in [0, 1, 3] {
        let folder = folder_with_python(true, code);
        let output = rannc(folder.path(), &[&CAPTURE[..], &["--meta"]].concat());
        assert_eq!(output.status.code(), Some(code.into()));
        assert_eq!(
            text(&output.stdout),
            "-m pyrannc capture model.py:build --meta -o graph.json\n"
        );
        assert_eq!(text(&output.stderr), "problem\n");
    }
}

#[test]
fn a_missing_package_and_a_missing_python_are_told_with_a_hint() {
    let folder = folder_with_python(false, 0);
    let output = rannc(folder.path(), &CAPTURE);
    assert_eq!(output.status.code(), Some(2));
    insta::assert_snapshot!(text(&output.stderr), @"
    error: `./python` does not have the package `pyrannc`

    hint: install it there, or name the interpreter that has it with `--python`
    ");
    let output = rannc(folder.path(), &[&CAPTURE[..5], &["./nowhere"]].concat());
    assert_eq!(output.status.code(), Some(2));
    insta::assert_snapshot!(text(&output.stderr), @"
    error: cannot run the Python interpreter `./nowhere`
    caused by: No such file or directory (os error 2)

    hint: install Python 3.10 or later, or name it with `--python`
    ");
}
