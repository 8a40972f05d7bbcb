//! A parser of server-sent events that takes bytes as they come: a chunk may end anywhere, between `\r` and `\n` too.

/// Keeps what is incomplete between chunks. Only `data` matters here: names, ids and comments are passed over.
#[derive(Debug, Default)]
pub(super) struct SseParser {
    /// The start of a line whose end has not come yet.
    line: Vec<u8>,
    /// The `data` lines of the event so far, joined by newlines.
    data: Vec<u8>,
    has_data: bool,
    /// The last byte was `\r`: a `\n` that follows belongs to it.
    after_cr: bool,
}

impl SseParser {
    /// Calls `on_event` with the data of each event that `bytes` completes.
    pub(super) fn feed(&mut self, mut bytes: &[u8], mut on_event: impl FnMut(&[u8])) {
        while let Some(&first) = bytes.first() {
            if std::mem::take(&mut self.after_cr) && first == b'\n' {
                bytes = &bytes[1..];
                continue;
            }
            let Some(end) = bytes.iter().position(|byte| matches!(byte, b'\n' | b'\r')) else {
                self.line.extend_from_slice(bytes);
                return;
            };
            self.after_cr = bytes[end] == b'\r';
            if self.line.is_empty() {
                self.finish_line(&bytes[..end], &mut on_event);
            } else {
                let mut line = std::mem::take(&mut self.line);
                line.extend_from_slice(&bytes[..end]);
                self.finish_line(&line, &mut on_event);
                line.clear();
                self.line = line;
            }
            bytes = &bytes[end + 1..];
        }
    }

    fn finish_line(&mut self, line: &[u8], on_event: &mut impl FnMut(&[u8])) {
        if line.is_empty() {
            if std::mem::take(&mut self.has_data) {
                on_event(&self.data);
                self.data.clear();
            }
        } else if let Some(value) = line.strip_prefix(b"data:") {
            if self.has_data {
                self.data.push(b'\n');
            }
            self.has_data = true;
            self.data.extend_from_slice(value.strip_prefix(b" ").unwrap_or(value));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const STREAM: &str = ": wait\n\ndata: {\"a\":1}\n\nevent: x\r\nid: 7\r\ndata:two\r\ndata:  lines\r\n\r\n\
                          retry: 5\n\ndata: ä\r\rdata: [DONE]\n\ndata: cut";

    fn events(chunks: &[&[u8]]) -> Vec<String> {
        let mut parser = SseParser::default();
        let mut events = Vec::new();
        for chunk in chunks {
            parser.feed(chunk, |data| events.push(String::from_utf8_lossy(data).into_owned()));
        }
        events
    }

    #[test]
    fn data_is_all_that_counts_and_an_event_without_its_empty_line_is_none() {
        assert_eq!(events(&[STREAM.as_bytes()]), ["{\"a\":1}", "two\n lines", "ä", "[DONE]"]);
    }

    #[test]
    fn a_chunk_may_end_anywhere() {
        let bytes = STREAM.as_bytes();
        let whole = events(&[bytes]);
        for first in 0..=bytes.len() {
            for second in first..=bytes.len() {
                let parts = [&bytes[..first], &bytes[first..second], &bytes[second..]];
                assert_eq!(events(&parts), whole, "cut at {first} and {second}");
            }
        }
        let single: Vec<&[u8]> = bytes.chunks(1).collect();
        assert_eq!(events(&single), whole);
    }
}
