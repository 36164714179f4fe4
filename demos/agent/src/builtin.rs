//! The checkpoint inside the program: used where the user names none.

use std::io;
use std::path::Path;

/// What it can do.
pub const WHAT: &str =
    "It is small and knows these tools alone: it computes, lists and reads files, tells the time and keeps notes.";

/// What to ask it first.
pub const TRY: &[&str] = &["What is 17.5% of 2480?", "What time is it in Tokyo?", "Make a note: buy milk and bread"];

/// Its files, by the names of a released checkpoint.
pub const FILES: [(&str, &[u8]); 6] = [
    ("config.json", include_bytes!("../model/config.json")),
    ("generation_config.json", include_bytes!("../model/generation_config.json")),
    ("chat_template.jinja", include_bytes!("../model/chat_template.jinja")),
    ("tokenizer.json", include_bytes!("../model/tokenizer.json")),
    ("tokenizer_config.json", include_bytes!("../model/tokenizer_config.json")),
    ("model.safetensors", include_bytes!("../model/model.safetensors")),
];

/// Writes the files into `dir`.
///
/// # Errors
/// Where they cannot be written.
pub fn unpack(dir: &Path) -> io::Result<()> {
    FILES.iter().try_for_each(|(name, content)| std::fs::write(dir.join(name), content))
}
