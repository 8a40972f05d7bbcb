//! One file of the disk tier: what it says of itself, what it holds, and two digests. Start with [`Head`].
//!
//! | bytes | what |
//! |---|---|
//! | 8 | `MNRVKV`, carriage return, line feed: a copy that was treated as text is noticed |
//! | 4 | version of this format |
//! | 4 | `n`, the number of tokens |
//! | 8 | `m`, the length of the state |
//! | 32 | [`StateKey`]: model, build and cache layout |
//! | 32 | [`NamespaceName`]: who may have it |
//! | 4 n | tokens |
//! | 32 | BLAKE3 of all before |
//! | m | state, as the backend gave it |
//! | 32 | BLAKE3 of the first digest and the state |
//!
//! Numbers are little-endian. BLAKE3 rather than a CRC: a state with one wrong bit is answers with wrong words, nobody would notice,
//! and a digest of 256 bits misses no fault at about the speed at which disks read. It is no signature: whoever may write to the folder
//! can write what he likes there.

use std::io::{ErrorKind, Read};

use minerva_llama::SavedState;

use crate::request::TokenId;

/// What a file begins with.
const MAGIC: [u8; 8] = *b"MNRVKV\r\n";

/// Raised with every change of the format or of what the bytes mean: older files are then dropped.
pub(super) const VERSION: u32 = 1;

/// What stands before the tokens.
const FIXED_BYTES: usize = 8 + 4 + 4 + 8 + 32 + 32;

const DIGEST_BYTES: usize = 32;

/// No prompt has more tokens.
const MOST_TOKENS: u32 = 1 << 24;

/// What decides whether bytes of one engine mean the same to another: a digest of all of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct StateKey(pub(crate) [u8; 32]);

/// The name of a namespace on disk, from which nobody finds out whose it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct NamespaceName(pub(crate) [u8; 32]);

/// All that a file says of itself.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Head {
    pub(super) key: StateKey,
    pub(super) namespace: NamespaceName,
    pub(super) tokens: Vec<TokenId>,
    pub(super) n_state_bytes: u64,
}

/// What is wrong with a file.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub(crate) enum Damage {
    #[error("it is no file of this cache")]
    NotOurs,
    #[error("it has another version of the format")]
    Version,
    #[error("it is larger than the limit")]
    TooLarge,
    #[error("its length is not the one that it says")]
    Length,
    #[error("its checksum is wrong")]
    Checksum,
    #[error("it cannot be read ({0})")]
    Unreadable(ErrorKind),
    #[error("there is no memory for it")]
    NoMemory,
}

impl Damage {
    /// Whether the file may be whole all the same, and another time be read.
    pub(super) fn may_pass(self) -> bool {
        match self {
            Self::Unreadable(kind) => kind != ErrorKind::NotFound,
            Self::NoMemory => true,
            Self::NotOurs | Self::Version | Self::TooLarge | Self::Length | Self::Checksum => false,
        }
    }
}

/// Bytes of a file that holds a state of so many bytes for so many tokens.
pub(crate) fn file_bytes(n_tokens: usize, n_state_bytes: u64) -> u64 {
    let around = (FIXED_BYTES + 2 * DIGEST_BYTES) as u64 + 4 * n_tokens as u64;
    n_state_bytes.saturating_add(around)
}

impl Head {
    /// What stands before the state, and the digest at its end.
    pub(super) fn to_bytes(&self) -> (Vec<u8>, [u8; DIGEST_BYTES]) {
        let mut bytes = Vec::with_capacity(FIXED_BYTES + 4 * self.tokens.len() + DIGEST_BYTES);
        bytes.extend(MAGIC);
        bytes.extend(VERSION.to_le_bytes());
        bytes.extend((self.tokens.len() as u32).to_le_bytes());
        bytes.extend(self.n_state_bytes.to_le_bytes());
        bytes.extend(self.key.0);
        bytes.extend(self.namespace.0);
        bytes.extend(self.tokens.iter().flat_map(|token| token.to_le_bytes()));
        let digest = *blake3::hash(&bytes).as_bytes();
        bytes.extend(digest);
        (bytes, digest)
    }

    /// Reads all up to the state of a file of `n_file_bytes`, of which no more than `most_bytes` are allowed. Returns the digest too.
    pub(super) fn read(
        file: &mut impl Read,
        n_file_bytes: u64,
        most_bytes: u64,
    ) -> Result<(Self, [u8; DIGEST_BYTES]), Damage> {
        if n_file_bytes > most_bytes {
            return Err(Damage::TooLarge);
        }
        let mut bytes = vec![0; FIXED_BYTES];
        fill(file, &mut bytes)?;
        let mut fields = Fields(&bytes);
        let (magic, version) = (fields.take::<8>(), u32::from_le_bytes(fields.take()));
        let (n_tokens, n_state_bytes) = (u32::from_le_bytes(fields.take()), u64::from_le_bytes(fields.take()));
        let (key, namespace) = (StateKey(fields.take()), NamespaceName(fields.take()));
        if magic != MAGIC {
            return Err(Damage::NotOurs);
        }
        if version != VERSION {
            return Err(Damage::Version);
        }
        // With this nothing below is larger than the file.
        if n_tokens > MOST_TOKENS || file_bytes(n_tokens as usize, n_state_bytes) != n_file_bytes {
            return Err(Damage::Length);
        }
        bytes.resize(FIXED_BYTES + 4 * n_tokens as usize, 0);
        fill(file, &mut bytes[FIXED_BYTES..])?;
        let mut digest = [0; DIGEST_BYTES];
        fill(file, &mut digest)?;
        if blake3::hash(&bytes) != digest {
            return Err(Damage::Checksum);
        }
        let (tokens, _) = bytes[FIXED_BYTES..].as_chunks();
        let tokens = tokens.iter().map(|&token| TokenId::from_le_bytes(token)).collect();
        Ok((Self { key, namespace, tokens, n_state_bytes }, digest))
    }
}

/// The digest at the end of a file.
pub(super) fn last_digest(head_digest: &[u8; DIGEST_BYTES], state: &[u8]) -> [u8; DIGEST_BYTES] {
    *blake3::Hasher::new().update(head_digest).update(state).finalize().as_bytes()
}

/// Reads the state behind a head, to the end of the file.
pub(super) fn read_state(
    file: &mut impl Read,
    head: &Head,
    head_digest: &[u8; DIGEST_BYTES],
) -> Result<SavedState, Damage> {
    let n_bytes = usize::try_from(head.n_state_bytes).map_err(|_| Damage::TooLarge)?;
    let mut state = SavedState::zeroed(n_bytes).ok_or(Damage::NoMemory)?;
    fill(file, &mut state)?;
    let mut digest = [0; DIGEST_BYTES];
    fill(file, &mut digest)?;
    // Constant time is not needed: it is no secret.
    if last_digest(head_digest, &state) != digest {
        return Err(Damage::Checksum);
    }
    match file.read(&mut [0]) {
        Ok(0) => Ok(state),
        Ok(_) => Err(Damage::Length),
        Err(error) => Err(Damage::Unreadable(error.kind())),
    }
}

fn fill(file: &mut impl Read, bytes: &mut [u8]) -> Result<(), Damage> {
    file.read_exact(bytes).map_err(|error| match error.kind() {
        ErrorKind::UnexpectedEof => Damage::Length,
        kind => Damage::Unreadable(kind),
    })
}

/// Bytes of which field after field is taken; whoever makes it knows that there are enough.
struct Fields<'a>(&'a [u8]);

impl Fields<'_> {
    fn take<const N: usize>(&mut self) -> [u8; N] {
        let (field, rest) = self.0.split_first_chunk().unwrap_or((&[0; N], &[]));
        self.0 = rest;
        *field
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn head(tokens: Vec<TokenId>, n_state_bytes: u64) -> Head {
        Head { key: StateKey([7; 32]), namespace: NamespaceName([9; 32]), tokens, n_state_bytes }
    }

    fn whole(tokens: Vec<TokenId>, state: &[u8]) -> Vec<u8> {
        let (mut bytes, digest) = head(tokens, state.len() as u64).to_bytes();
        bytes.extend(state);
        bytes.extend(last_digest(&digest, state));
        bytes
    }

    fn read(bytes: &[u8]) -> Result<(Head, SavedState), Damage> {
        let mut file = bytes;
        let (head, digest) = Head::read(&mut file, bytes.len() as u64, 1 << 20)?;
        let state = read_state(&mut file, &head, &digest)?;
        Ok((head, state))
    }

    #[test]
    fn every_flipped_bit_and_every_length_but_the_right_one_is_found() {
        let bytes = whole((0..40).collect(), &[5; 300]);
        assert_eq!(bytes.len() as u64, file_bytes(40, 300));
        assert_eq!(read(&bytes), Ok((head((0..40).collect(), 300), vec![5; 300].into())));
        for i in 0..bytes.len() {
            for bit in 0..8 {
                let mut flipped = bytes.clone();
                flipped[i] ^= 1 << bit;
                assert!(read(&flipped).is_err(), "bit {bit} of byte {i}");
            }
            assert!(read(&bytes[..i]).is_err(), "{i} bytes");
            // A file that shrinks or grows after its length was asked for.
            let mut file = &bytes[..i];
            let whole = Head::read(&mut file, bytes.len() as u64, 1 << 20)
                .and_then(|(head, digest)| read_state(&mut file, &head, &digest));
            assert!(whole.is_err(), "{i} bytes, said to be more");
        }
        let longer = [bytes.as_slice(), &[0]].concat();
        assert_eq!(read(&longer), Err(Damage::Length));
        let mut file = longer.as_slice();
        let (head, digest) = Head::read(&mut file, bytes.len() as u64, 1 << 20).expect("the head is whole");
        assert_eq!(read_state(&mut file, &head, &digest), Err(Damage::Length));
    }

    #[test]
    fn what_is_wrong_is_said() {
        let bytes = whole(vec![1, 2, 3], b"state");
        let with = |at: usize, byte: u8| {
            let mut other = bytes.clone();
            other[at] = byte;
            read(&other)
        };
        assert_eq!(with(0, b'm'), Err(Damage::NotOurs));
        assert_eq!(with(8, 200), Err(Damage::Version));
        assert_eq!(with(12, 200), Err(Damage::Length));
        assert_eq!(with(15, 200), Err(Damage::Length));
        assert_eq!(with(23, 200), Err(Damage::Length), "2^63 bytes of state");
        assert_eq!(with(24, 0), Err(Damage::Checksum));
        assert_eq!(with(bytes.len() - 40, 0), Err(Damage::Checksum));
        assert_eq!(Head::read(&mut bytes.as_slice(), bytes.len() as u64, 20), Err(Damage::TooLarge));
        assert_eq!(read(&[]), Err(Damage::Length));
        assert_eq!(read(&[b'x'; 5000]), Err(Damage::NotOurs));
    }

    proptest! {
        #[test]
        fn what_is_written_is_read(
            tokens in prop::collection::vec(any::<TokenId>(), 0..200),
            state in prop::collection::vec(any::<u8>(), 0..500),
        ) {
            let (head, found) = read(&whole(tokens.clone(), &state)).expect("it is whole");
            prop_assert_eq!((head.tokens, found), (tokens, state.into()));
        }

        #[test]
        fn no_bytes_are_taken_for_a_file_and_none_take_more_memory_than_they_are(
            mut bytes in prop::collection::vec(any::<u8>(), 0..400),
            begins_well in any::<bool>(),
        ) {
            if begins_well && bytes.len() > 12 {
                bytes[..8].copy_from_slice(&MAGIC);
                bytes[8..12].copy_from_slice(&VERSION.to_le_bytes());
            }
            prop_assert!(read(&bytes).is_err());
        }
    }
}
