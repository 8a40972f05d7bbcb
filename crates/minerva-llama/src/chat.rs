//! Chat templates, through llama.cpp's common library, which knows every model family.

use std::ffi::{CString, c_char};
use std::ptr::{self, NonNull};
use std::sync::Arc;

use serde::{Deserialize, Serialize};

use crate::error::{CallError, call};
use crate::{Model, backend, sys};

/// Longest template that is parsed. The longest in use are about 30 kB.
const MAX_TEMPLATE_BYTES: usize = 256 << 10;

/// Deepest nesting of blocks and brackets in a template. The parser recurses: about 5,500 levels end the process.
const MAX_NESTING: usize = 256;

/// A model's chat template, parsed.
#[derive(Debug)]
pub struct ChatTemplate {
    raw: NonNull<sys::mnv_chat>,
    _model: Arc<Model>, // the template's special tokens come from the model's vocabulary
}

// SAFETY: rendering reads the parsed template and keeps its state on the stack of the call.
unsafe impl Send for ChatTemplate {}
// SAFETY: as above.
unsafe impl Sync for ChatTemplate {}

/// A rendered conversation, and what is needed to read the answer.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct ChatPrompt {
    /// The prompt. Control tokens are in it as text: tokenize with `parse_special`.
    pub prompt: String,
    /// llama.cpp's number of the answer's format.
    pub format: i64,
    /// The answer's parser, in llama.cpp's own notation.
    pub parser: String,
    /// A grammar that the answer has to follow, in GBNF; empty for none.
    pub grammar: String,
    /// Whether the grammar applies only after a trigger.
    pub grammar_lazy: bool,
    /// The part of the prompt that opens the answer.
    pub generation_prompt: String,
    /// Texts that end the answer, beside the end-of-generation tokens.
    pub additional_stops: Vec<String>,
    /// Special tokens that the answer's parser has to see as text.
    pub preserved_tokens: Vec<String>,
}

impl ChatTemplate {
    /// The model's own template, or `template` in its place. `None` when there is neither.
    ///
    /// # Errors
    /// [`CallError`] naming the place when the template does not parse.
    pub fn new(model: &Arc<Model>, template: Option<&str>) -> Result<Option<Self>, CallError> {
        let own = model_template(model);
        let Some(source) = template.or(own.as_deref()) else { return Ok(None) };
        check_bounds(source)?;
        let replacement = template.map(CString::new).transpose().map_err(|_| nul("chat template"))?;
        let mut raw = ptr::null_mut();
        // SAFETY: a live model, and a string that outlives the call; `raw` receives the template.
        call(|error| unsafe {
            sys::mnv_chat_new(
                model.raw(),
                replacement.as_ref().map_or(ptr::null(), |t| t.as_ptr()),
                &raw mut raw,
                error,
            )
        })?;
        let raw = NonNull::new(raw).ok_or_else(|| CallError::Refused("no template was returned".into()))?;
        Ok(Some(Self { raw, _model: Arc::clone(model) }))
    }

    /// Renders a request: JSON with `messages` and optional `tools`, `tool_choice`, `add_generation_prompt`, in OpenAI's
    /// form. The answer is [`ChatPrompt`] as JSON.
    ///
    /// # Errors
    /// [`CallError::Exception`] with the template's own message when it rejects the conversation.
    pub fn render(&self, request_json: &str) -> Result<String, CallError> {
        let request = CString::new(request_json).map_err(|_| nul("conversation"))?;
        let mut out = ptr::null_mut();
        // SAFETY: a live template and a string that outlives the call; `out` receives a string of ours to free.
        call(|error| unsafe { sys::mnv_chat_apply(self.raw.as_ptr(), request.as_ptr(), &raw mut out, error) })?;
        Ok(take_string(out))
    }

    /// Reads an answer into OpenAI's message JSON. `syntax` is what [`render`](Self::render) returned.
    ///
    /// # Errors
    /// [`CallError::Exception`] when a complete answer does not follow its format.
    pub fn parse(syntax: &str, text: &str, is_partial: bool) -> Result<String, CallError> {
        let syntax = CString::new(syntax).map_err(|_| nul("syntax"))?;
        let text = CString::new(text).map_err(|_| nul("answer"))?;
        let mut out = ptr::null_mut();
        // SAFETY: strings that outlive the call; `out` receives a string of ours to free.
        call(|error| unsafe { sys::mnv_chat_parse(syntax.as_ptr(), text.as_ptr(), is_partial, &raw mut out, error) })?;
        Ok(take_string(out))
    }
}

impl Drop for ChatTemplate {
    fn drop(&mut self) {
        // SAFETY: made by `mnv_chat_new`, freed only here.
        unsafe { sys::mnv_chat_free(self.raw.as_ptr()) };
    }
}

fn model_template(model: &Model) -> Option<String> {
    // SAFETY: a live model; null asks for the default template.
    let raw = unsafe { sys::llama_model_chat_template(model.raw(), ptr::null()) };
    (!raw.is_null()).then(|| backend::text(raw))
}

fn take_string(raw: *mut c_char) -> String {
    let text = backend::text(raw);
    // SAFETY: allocated by the shim, freed once; null is allowed.
    unsafe { sys::mnv_string_free(raw) };
    text
}

fn nul(what: &str) -> CallError {
    CallError::Argument(format!("the {what} contains a NUL byte"))
}

/// Refuses templates that would overrun the recursive parser. Counts what opens a level and what may close one, without
/// understanding strings: a wrong count can only come out too high for text full of brackets.
fn check_bounds(template: &str) -> Result<(), CallError> {
    if template.len() > MAX_TEMPLATE_BYTES {
        let given = template.len();
        return Err(CallError::Argument(format!(
            "the chat template has {given} bytes, the limit is {MAX_TEMPLATE_BYTES}"
        )));
    }
    let (mut blocks, mut brackets, mut deepest) = (0usize, 0usize, 0usize);
    let mut rest = template;
    while let Some(first) = rest.chars().next() {
        if let Some(tag) = rest.strip_prefix("{%") {
            let word = tag.trim_start_matches(['-', '+', ' ', '\t', '\n', '\r']);
            if word.starts_with("end") {
                blocks = blocks.saturating_sub(1);
            } else if ["if", "for", "macro", "call", "filter", "generation", "set"].iter().any(|w| word.starts_with(w))
            {
                blocks += 1;
                // A one-line `set` opens no level.
                if word.starts_with("set") && tag.split("%}").next().is_some_and(|body| body.contains('=')) {
                    blocks -= 1;
                }
            }
        }
        match first {
            '(' | '[' | '{' => brackets += 1,
            ')' | ']' | '}' => brackets = brackets.saturating_sub(1),
            _ => {}
        }
        deepest = deepest.max(blocks + brackets);
        if deepest > MAX_NESTING {
            return Err(CallError::Argument(format!("the chat template nests more than {MAX_NESTING} levels deep")));
        }
        rest = &rest[first.len_utf8()..];
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn deep_templates_are_refused_and_long_flat_ones_are_not() {
        let deep = "{% if a %}".repeat(6000);
        assert!(matches!(check_bounds(&deep), Err(CallError::Argument(_))));
        let brackets = format!("{{{{ {} }}}}", "(".repeat(6000));
        assert!(matches!(check_bounds(&brackets), Err(CallError::Argument(_))));
        let flat = "{% if a %}{{ b['c'] }}{% endif %}{% set d = 1 %}".repeat(2000);
        assert_eq!(check_bounds(&flat), Ok(()));
    }
}
