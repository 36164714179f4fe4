//! Listing and reading files below one folder.
//!
//! The folder is opened once; every path is resolved below that handle by `cap-std`, one component at a time, so neither `..` nor
//! a symbolic link nor a folder swapped meanwhile leads out of it.

use std::io::{ErrorKind, Read};
use std::path::{Component, Path, PathBuf};
use std::sync::Arc;

use cap_std::{ambient_authority, fs::Dir};
use serde_json::{Map, Value, json};

use super::{OUTPUT_LIMIT, Spec, Tool, beginning};

/// Larger files are not read.
const FILE_LIMIT: u64 = 16 << 20;
/// Of a larger folder the first entries are listed.
const ENTRY_LIMIT: usize = 200;
/// A NUL among the first bytes marks a file as binary.
const BINARY_PROBE: usize = 8 << 10;
/// Of a read; leaves room for the note on what was left out.
const TEXT_LIMIT: usize = OUTPUT_LIMIT - 512;

/// The folder that the file tools see.
pub struct Folder {
    dir: Dir,
    path: PathBuf,
}

impl Folder {
    /// Opens it.
    ///
    /// # Errors
    /// If it is not a folder that can be read.
    pub fn open(path: &Path) -> std::io::Result<Arc<Self>> {
        let dir = Dir::open_ambient_dir(path, ambient_authority())?;
        dir.entries()?;
        Ok(Arc::new(Folder { dir, path: path.canonicalize()? }))
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// `path` as the model wrote it, without `.` components.
    fn inside(&self, path: &str) -> Result<PathBuf, String> {
        let mut inside = PathBuf::new();
        for component in Path::new(path.trim()).components() {
            match component {
                Component::Normal(name) => inside.push(name),
                Component::CurDir => {}
                Component::ParentDir => {
                    return Err(format!(
                        "{path:?} is refused: \"..\" is not allowed, only files inside the shared folder can be read"
                    ));
                }
                Component::RootDir | Component::Prefix(_) => {
                    return Err(format!(
                        "{path:?} is refused: only paths relative to the shared folder are allowed, such as \"notes/todo.txt\""
                    ));
                }
            }
        }
        Ok(inside)
    }

    fn explain(&self, path: &str, why: std::io::Error) -> String {
        match why.kind() {
            ErrorKind::NotFound => format!("there is no {path:?} in the shared folder"),
            // What cap-std says of a link that leads out is a permission error too.
            ErrorKind::PermissionDenied => {
                format!("{path:?} is refused: it cannot be read, or it leads out of the shared folder")
            }
            _ => format!("{path:?} cannot be read: {why}"),
        }
    }

    fn list(&self, path: &str) -> Result<String, String> {
        let inside = self.inside(path)?;
        let dir = if inside.as_os_str().is_empty() {
            self.dir.try_clone()
        } else {
            if self.dir.metadata(&inside).map_err(|why| self.explain(path, why))?.is_file() {
                return Err(format!("{path:?} is a file; read it with read_file"));
            }
            self.dir.open_dir(&inside)
        };
        let entries = dir.and_then(|dir| dir.entries()).map_err(|why| self.explain(path, why))?;
        let mut names = Vec::new();
        for entry in entries {
            let entry = entry.map_err(|why| self.explain(path, why))?;
            let name = entry.file_name().to_string_lossy().into_owned();
            names.push(match entry.metadata() {
                Ok(found) if found.is_dir() => format!("{name}/"),
                Ok(found) if found.is_file() => format!("{name} ({} bytes)", found.len()),
                Ok(found) if found.is_symlink() => format!("{name} (link)"),
                _ => format!("{name} (not a plain file)"),
            });
        }
        names.sort();
        let total = names.len();
        if total == 0 {
            return Ok("The folder is empty.".into());
        }
        names.truncate(ENTRY_LIMIT);
        let mut text = names.join("\n");
        if total > ENTRY_LIMIT {
            text += &format!("\n[the first {ENTRY_LIMIT} of {total} entries]");
        }
        Ok(text)
    }

    fn read(&self, path: &str, start: usize, lines: usize) -> Result<String, String> {
        let inside = self.inside(path)?;
        if inside.as_os_str().is_empty() {
            return Err(format!("{path:?} is the shared folder itself; list it with list_files"));
        }
        let found = self.dir.metadata(&inside).map_err(|why| self.explain(path, why))?;
        if found.is_dir() {
            return Err(format!("{path:?} is a folder; list it with list_files"));
        }
        if !found.is_file() {
            return Err(format!("{path:?} is neither a file nor a folder"));
        }
        if found.len() > FILE_LIMIT {
            return Err(format!("{path:?} has {} bytes; files beyond {FILE_LIMIT} are not read", found.len()));
        }
        let mut bytes = Vec::new();
        let file = self.dir.open(&inside).map_err(|why| self.explain(path, why))?;
        file.take(FILE_LIMIT).read_to_end(&mut bytes).map_err(|why| self.explain(path, why))?;
        if bytes[..bytes.len().min(BINARY_PROBE)].contains(&0) {
            return Err(format!("{path:?} is a binary file of {} bytes", bytes.len()));
        }
        let text = String::from_utf8_lossy(&bytes);
        let mut notes = Vec::new();
        if matches!(text, std::borrow::Cow::Owned(_)) {
            notes.push("not valid UTF-8: bad bytes are shown as \u{fffd}".to_string());
        }
        Ok(select(&text, start, lines, notes))
    }
}

/// `lines` lines from line `start` (counted from 1) as far as they fit, and what was left out.
fn select(text: &str, start: usize, lines: usize, mut notes: Vec<String>) -> String {
    let total = text.lines().count();
    if total == 0 {
        notes.push("the file is empty".into());
    } else if start > total {
        notes.push(format!("the file has only {total} lines"));
    }
    let mut part = String::new();
    let mut taken = 0;
    for line in text.split_inclusive('\n').skip(start - 1).take(lines) {
        if part.len() + line.len() > TEXT_LIMIT {
            if taken == 0 {
                part.push_str(beginning(line, TEXT_LIMIT));
                notes.push(format!("line {start} is cut: it has {} bytes", line.len()));
                taken = 1;
            }
            break;
        }
        part.push_str(line);
        taken += 1;
    }
    let last = start - 1 + taken;
    if taken > 0 && (start > 1 || last < total) {
        let more = if last < total { format!("; go on with start_line {}", last + 1) } else { String::new() };
        notes.push(format!("lines {start} to {last} of {total}{more}"));
    }
    for note in notes {
        if !part.is_empty() && !part.ends_with('\n') {
            part.push('\n');
        }
        part += &format!("[{note}]");
    }
    part
}

/// Lists a folder below the shared one.
pub struct ListFiles(pub Arc<Folder>);

impl Tool for ListFiles {
    fn spec(&self) -> Spec {
        let path =
            json!({"type": "string", "description": "relative to the shared folder; the folder itself when left out"});
        Spec::new("list_files", "Lists the files and folders in the shared folder.", &[("path", path, false)])
    }

    fn call(&self, arguments: &Map<String, Value>) -> Result<String, String> {
        self.0.list(arguments.get("path").and_then(Value::as_str).unwrap_or("."))
    }
}

/// Reads a text file below the shared folder.
pub struct ReadFile(pub Arc<Folder>);

impl Tool for ReadFile {
    fn spec(&self) -> Spec {
        let path = json!({"type": "string", "description": "relative to the shared folder"});
        let start = json!({"type": "integer", "description": "first line to read, 1 when left out"});
        let lines = json!({"type": "integer", "description": "number of lines, 200 when left out"});
        let what = "Reads a text file in the shared folder.";
        Spec::new("read_file", what, &[("path", path, true), ("start_line", start, false), ("lines", lines, false)])
    }

    fn call(&self, arguments: &Map<String, Value>) -> Result<String, String> {
        let count = |key: &str, default: u64| match arguments.get(key) {
            None => Ok(default as usize),
            Some(value) => match value.as_u64() {
                Some(n @ 1..=1_000_000_000) => Ok(n as usize),
                _ => Err(format!("{key} must be a number from 1 on, not {value}")),
            },
        };
        let (start, lines) = (count("start_line", 1)?, count("lines", 200)?);
        self.0.read(arguments.get("path").and_then(Value::as_str).unwrap_or_default(), start, lines)
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    fn folder() -> (tempfile::TempDir, Arc<Folder>) {
        let outer = tempfile::tempdir().unwrap();
        let root = outer.path().join("root");
        fs::create_dir_all(root.join("sub")).unwrap();
        fs::write(outer.path().join("secret"), "secret").unwrap();
        fs::write(root.join("a.txt"), "one\ntwo\nthree\n").unwrap();
        fs::write(root.join("sub/b.txt"), "b").unwrap();
        fs::write(root.join("empty"), "").unwrap();
        fs::write(root.join("binary"), b"ab\0cd").unwrap();
        fs::write(root.join("latin1"), b"caf\xe9").unwrap();
        fs::write(root.join("long"), "x".repeat(100_000)).unwrap();
        fs::write(root.join("many"), "a line\n".repeat(10_000)).unwrap();
        let folder = Folder::open(&root).unwrap();
        (outer, folder)
    }

    #[test]
    fn lists_and_reads() {
        let (_outer, folder) = folder();
        let all = folder.list(".").unwrap();
        assert!(all.starts_with("a.txt (14 bytes)\nbinary (5 bytes)\n") && all.ends_with("\nsub/"), "{all}");
        assert_eq!(folder.list("sub").unwrap(), "b.txt (1 bytes)");
        assert_eq!(folder.read("./sub/./b.txt", 1, 200).unwrap(), "b");
        assert_eq!(folder.read("a.txt", 1, 200).unwrap(), "one\ntwo\nthree\n");
        assert_eq!(folder.read("a.txt", 2, 1).unwrap(), "two\n[lines 2 to 2 of 3; go on with start_line 3]");
        assert_eq!(folder.read("a.txt", 3, 9).unwrap(), "three\n[lines 3 to 3 of 3]");
        assert_eq!(folder.read("a.txt", 9, 9).unwrap(), "[the file has only 3 lines]");
        assert_eq!(folder.read("empty", 1, 9).unwrap(), "[the file is empty]");
        assert_eq!(
            folder.read("latin1", 1, 9).unwrap(),
            "caf\u{fffd}\n[not valid UTF-8: bad bytes are shown as \u{fffd}]"
        );
    }

    #[test]
    fn long_files_come_in_parts() {
        let (_outer, folder) = folder();
        let long = folder.read("long", 1, 200).unwrap();
        assert!(long.len() < OUTPUT_LIMIT && long.ends_with("\n[line 1 is cut: it has 100000 bytes]"));
        let many = folder.read("many", 1, 100_000).unwrap();
        assert!(many.len() < OUTPUT_LIMIT && many.contains("of 10000; go on with start_line "));
    }

    #[test]
    fn nothing_outside_is_reached() {
        let (outer, folder) = folder();
        let absolute = outer.path().join("secret").display().to_string();
        for path in ["../secret", "../../etc/passwd", "sub/../../secret", "..", "sub/..", "/etc/passwd", "/", &absolute]
        {
            for result in [folder.read(path, 1, 9), folder.list(path)] {
                let why = result.unwrap_err();
                assert!(why.contains("refused") && why.contains(path), "{path}: {why}");
            }
        }
        for (path, expected) in [
            ("nothing", "no \"nothing\""),
            ("sub", "is a folder"),
            ("", "itself"),
            ("a.txt/x", "a.txt/x"),
            ("binary", "binary"),
        ] {
            let why = folder.read(path, 1, 9).unwrap_err();
            assert!(why.contains(expected), "{path}: {why}");
        }
        assert!(folder.list("a.txt").unwrap_err().contains("is a file"));
        assert!(folder.read("a\0b", 1, 9).is_err());
    }

    #[cfg(unix)]
    #[test]
    fn links_do_not_lead_out() {
        use std::os::unix::fs::symlink;
        let (outer, folder) = folder();
        let root = outer.path().join("root");
        symlink("../secret", root.join("relative")).unwrap();
        symlink(outer.path().join("secret"), root.join("absolute")).unwrap();
        symlink(outer.path(), root.join("up")).unwrap();
        symlink("a.txt", root.join("within")).unwrap();
        symlink("loop", root.join("loop")).unwrap();
        for path in ["relative", "absolute", "up/secret", "loop"] {
            let why = folder.read(path, 1, 9).unwrap_err();
            assert!(!why.contains("one\n"), "{path}: {why}");
        }
        assert!(folder.list("up").is_err());
        assert_eq!(folder.read("within", 1, 1).unwrap(), "one\n[lines 1 to 1 of 3; go on with start_line 2]");
        assert!(folder.list(".").unwrap().contains("relative (link)"));
    }

    #[test]
    fn a_bad_folder_is_an_error() {
        let (outer, _) = folder();
        assert!(Folder::open(&outer.path().join("none")).is_err());
        assert!(Folder::open(&outer.path().join("root/a.txt")).is_err());
    }
}
