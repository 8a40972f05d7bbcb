//! Bytes from a stream, never more than the file has left and never into more memory than they fill.

use std::fmt::Arguments;
use std::io::{self, Read};

use super::error::GgufError;
use super::limits::MAX_HEADER_BYTES;

/// Memory is reserved for at most this many bytes before any of them were read.
const CHUNK_BYTES: u64 = 64 << 10;

/// A reader that knows its position and how far it may go.
///
/// `field` arguments name what is being read; they are only made into text for an error.
pub(super) struct Source<R> {
    reader: R,
    position: u64,
    file_bytes: u64,
}

impl<R: Read> Source<R> {
    pub(super) fn new(reader: R, file_bytes: u64) -> Self {
        Self { reader, position: 0, file_bytes }
    }

    /// Bytes read so far, which is the offset of the next field.
    pub(super) fn position(&self) -> u64 {
        self.position
    }

    /// Bytes from here to the end of the file.
    pub(super) fn left(&self) -> u64 {
        self.file_bytes.saturating_sub(self.position)
    }

    /// Checks that the file has `needed` more bytes and that the header stays within its limit with them.
    pub(super) fn require(&self, needed: u64, field: Arguments<'_>) -> Result<(), GgufError> {
        if needed > self.left() {
            return Err(self.truncated(needed, self.left(), field));
        }
        if self.position + needed > MAX_HEADER_BYTES {
            return Err(GgufError::TooLarge {
                field: format!("the header's length with {field}"),
                offset: self.position,
                given: self.position + needed,
                limit: MAX_HEADER_BYTES,
            });
        }
        Ok(())
    }

    pub(super) fn u32(&mut self, field: Arguments<'_>) -> Result<u32, GgufError> {
        Ok(u32::from_le_bytes(self.array(field)?))
    }

    pub(super) fn u64(&mut self, field: Arguments<'_>) -> Result<u64, GgufError> {
        Ok(u64::from_le_bytes(self.array(field)?))
    }

    pub(super) fn array<const N: usize>(&mut self, field: Arguments<'_>) -> Result<[u8; N], GgufError> {
        self.require(N as u64, field)?;
        let mut bytes = [0; N];
        self.fill(&mut bytes, field)?;
        Ok(bytes)
    }

    /// Appends `n` bytes to `buffer`.
    pub(super) fn append(&mut self, buffer: &mut Vec<u8>, n: u64, field: Arguments<'_>) -> Result<(), GgufError> {
        self.require(n, field)?;
        let mut left = n;
        while left > 0 {
            let chunk = left.min(CHUNK_BYTES) as usize;
            let start = buffer.len();
            buffer.resize(start + chunk, 0);
            self.fill(&mut buffer[start..], field)?;
            left -= chunk as u64;
        }
        Ok(())
    }

    /// A string: its length in 64 bits, then its bytes, at most `limit` of them. Returns the length.
    pub(super) fn append_string(
        &mut self,
        buffer: &mut Vec<u8>,
        limit: u64,
        field: Arguments<'_>,
    ) -> Result<u64, GgufError> {
        let offset = self.position;
        let length = self.u64(format_args!("the length of {field}"))?;
        if length > limit {
            return Err(GgufError::TooLarge { field: format!("the length of {field}"), offset, given: length, limit });
        }
        self.append(buffer, length, field)?;
        Ok(length)
    }

    fn fill(&mut self, bytes: &mut [u8], field: Arguments<'_>) -> Result<(), GgufError> {
        match self.reader.read_exact(bytes) {
            Ok(()) => {
                self.position += bytes.len() as u64;
                Ok(())
            }
            // The file is shorter than its size was, or the caller's size was wrong.
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => {
                Err(self.truncated(bytes.len() as u64, 0, field))
            }
            Err(source) => Err(GgufError::Io { file: field.to_string(), source }),
        }
    }

    fn truncated(&self, needed: u64, left: u64, field: Arguments<'_>) -> GgufError {
        GgufError::Truncated { field: field.to_string(), offset: self.position, needed, left }
    }
}
