//! The file of `--warm`: prompts that are computed before the server is ready.
//!
//! Each line is one prompt: a JSON object with `prompt` or `messages` if it begins with `{`, else the text of the line. Empty lines are
//! skipped. A line that cannot be used is an error that names it, before anything is loaded.

use std::fs::File;
use std::io::Read as _;
use std::path::{Path, PathBuf};

use minerva_engine::{Prompt, WarmPrompt};

use crate::api::chat;
use crate::api::error::ApiError;
use crate::api::fields::Fields;
use crate::config::{ConfigError, in_line};

const WHAT: &str = "the file of prompts to warm";

/// Far more than any context holds.
const MOST_BYTES: u64 = 64 << 20;

const MOST_PROMPTS: usize = 1024;

/// The prompts of a file, with the lines that they stand on.
pub(crate) struct WarmFile {
    pub(crate) path: PathBuf,
    pub(crate) prompts: Vec<WarmPrompt>,
    lines: Vec<usize>,
}

impl WarmFile {
    pub(crate) fn read(path: &Path) -> Result<Self, ConfigError> {
        let wrong = |problem: String| ConfigError::File { what: WHAT, file: path.to_path_buf(), problem };
        let mut bytes = Vec::new();
        let file = File::open(path).map_err(|problem| wrong(problem.to_string()))?;
        file.take(MOST_BYTES + 1).read_to_end(&mut bytes).map_err(|problem| wrong(problem.to_string()))?;
        if bytes.len() as u64 > MOST_BYTES {
            return Err(wrong(format!("it has more than {MOST_BYTES} bytes, which is the limit")));
        }
        let mut warm = Self { path: path.to_path_buf(), prompts: Vec::new(), lines: Vec::new() };
        for (line, bytes) in (1..).zip(bytes.split(|&byte| byte == b'\n')) {
            let text = std::str::from_utf8(bytes).map_err(|_| in_line(WHAT, path, line, "it is not UTF-8"))?;
            if text.trim().is_empty() {
                continue;
            }
            let prompt = parse(text).map_err(|problem| in_line(WHAT, path, line, &problem.message))?;
            warm.prompts.push(prompt);
            warm.lines.push(line);
            if warm.prompts.len() > MOST_PROMPTS {
                return Err(in_line(
                    WHAT,
                    path,
                    line,
                    &format!("it is one more than {MOST_PROMPTS} prompts, which is the limit"),
                ));
            }
        }
        Ok(warm)
    }

    /// The line of a prompt.
    pub(crate) fn line(&self, index: usize) -> usize {
        self.lines.get(index).copied().unwrap_or(0)
    }
}

fn parse(line: &str) -> Result<WarmPrompt, ApiError> {
    let line = line.strip_prefix('\u{feff}').unwrap_or(line); // some editors begin a file with it
    if !line.trim_start().starts_with('{') {
        let text = line.strip_suffix('\r').unwrap_or(line);
        return Ok(WarmPrompt { prompt: Prompt::Text(text.to_owned()), is_pinned: true });
    }
    let mut fields = Fields::parse(line.as_bytes())?;
    let is_pinned = fields.bool("pin")?.unwrap_or(true);
    let prompt = match (fields.string("prompt")?, fields.get("messages").is_some()) {
        (Some(_), true) => return Err(ApiError::wrong_value("prompt", "alone, without `messages`")),
        (Some(text), false) if text.is_empty() => {
            return Err(ApiError::wrong_value("prompt", "a text that is not empty"));
        }
        (Some(text), false) => Prompt::Text(text),
        (None, true) => Prompt::Chat(chat::messages(&mut fields, &mut None)?),
        (None, false) => return Err(ApiError::missing("prompt` or `messages")),
    };
    match fields.into_unknown().next() {
        Some(name) => Err(ApiError::field(&name, "unknown_parameter", format!("`{name}` is not known here"))),
        None => Ok(WarmPrompt { prompt, is_pinned }),
    }
}

#[cfg(test)]
mod tests {
    use minerva_engine::ChatMessage;

    use super::*;

    fn read(text: impl AsRef<[u8]>) -> Result<WarmFile, String> {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), text).unwrap();
        WarmFile::read(file.path()).map_err(|problem| problem.to_string())
    }

    #[test]
    fn a_line_is_a_text_or_an_object() {
        let text = "Once upon a time \r\n\n{\"prompt\": \"two\\nlines\", \"pin\": false}\n\
            {\"messages\": [{\"role\": \"system\", \"content\": [{\"type\": \"text\", \"text\": \"Be brief.\"}]}]}\n";
        let warm = read(text).unwrap();
        let expected = [
            (Prompt::Text("Once upon a time ".into()), true),
            (Prompt::Text("two\nlines".into()), false),
            (Prompt::Chat(vec![ChatMessage::system("Be brief.")]), true),
        ];
        assert_eq!(warm.prompts, expected.map(|(prompt, is_pinned)| WarmPrompt { prompt, is_pinned }));
        assert_eq!([0, 1, 2].map(|i| warm.line(i)), [1, 3, 4]);
    }

    #[test]
    fn a_line_that_cannot_be_used_is_named() {
        for (text, line, problem) in [
            ("{}", 1, "`prompt` or `messages` is required"),
            ("a\n\n{\"prompt\": 1}", 3, "`prompt` must be a string"),
            ("{\"prompt\": \"a\"", 1, "not valid JSON"),
            ("{\"prompt\": \"\"}", 1, "not empty"),
            ("{\"prompt\": \"a\", \"messages\": []}", 1, "alone"),
            ("{\"messages\": []}", 1, "at least one message"),
            ("{\"messages\": [{\"role\": \"king\"}]}", 1, "`messages[0].role`"),
            ("a\n{\"prompt\": \"a\", \"pinned\": true}", 2, "`pinned` is not known"),
            ("{\"prompt\": \"a\", \"pin\": 1}", 1, "`pin` must be a boolean"),
        ] {
            let said = read(text).err().unwrap();
            assert!(said.contains(&format!("line {line}: ")) && said.contains(problem), "{said}");
        }
        let said = read([b"a\n".as_slice(), &[0xff]].concat()).err().unwrap();
        assert!(said.contains("line 2: it is not UTF-8"), "{said}");
        assert!(read("a\n".repeat(MOST_PROMPTS + 1)).err().unwrap().contains("line 1025"));
        assert!(WarmFile::read(Path::new("/nowhere/at/all")).is_err());
    }
}
