//! The key-value pairs of a header, in file order, with typed access.

use std::fmt::Display;

use super::error::GgufError;
use super::limits::MAX_LAYERS;
use super::value::{Array, StringArray, Value};

/// Keys and values of one file, in its order; each key once.
#[derive(Debug, Clone, Default)]
#[doc(alias = "gguf_kv")]
pub struct Metadata {
    entries: Vec<Entry>,
    /// Indices into `entries`, ordered by key.
    by_key: Vec<u32>,
}

#[derive(Debug, Clone)]
pub(super) struct Entry {
    pub(super) key: String,
    pub(super) value: Value,
    /// Where the entry begins in the file, for error texts.
    pub(super) offset: u64,
}

impl Metadata {
    /// # Errors
    /// [`GgufError::Duplicate`] for a key that is there twice.
    pub(super) fn new(entries: Vec<Entry>) -> Result<Self, GgufError> {
        let mut by_key: Vec<u32> = (0..entries.len() as u32).collect();
        by_key.sort_by(|&a, &b| entries[a as usize].key.cmp(&entries[b as usize].key)); // stable: the second stays second
        for pair in by_key.windows(2) {
            let (first, second) = (&entries[pair[0] as usize], &entries[pair[1] as usize]);
            if first.key == second.key {
                return Err(GgufError::Duplicate { field: format!("the key `{}`", second.key), offset: second.offset });
            }
        }
        Ok(Self { entries, by_key })
    }

    fn entry(&self, key: &str) -> Option<&Entry> {
        let position =
            self.by_key.binary_search_by(|&index| self.entries[index as usize].key.as_str().cmp(key)).ok()?;
        self.entries.get(*self.by_key.get(position)? as usize)
    }

    /// Where the entry begins in the file; 0 if there is none.
    pub(super) fn offset(&self, key: &str) -> u64 {
        self.entry(key).map_or(0, |entry| entry.offset)
    }

    /// The value of a key, whatever its type.
    pub fn get(&self, key: &str) -> Option<&Value> {
        self.entry(key).map(|entry| &entry.value)
    }

    /// Keys and values in file order.
    pub fn iter(&self) -> impl Iterator<Item = (&str, &Value)> {
        self.entries.iter().map(|entry| (entry.key.as_str(), &entry.value))
    }

    /// Entries.
    pub fn len(&self) -> usize {
        self.entries.len()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    /// A number that fits in 32 bits by its type: `u8`, `u16` or `u32`. `None` if the key is not there.
    ///
    /// # Errors
    /// [`GgufError::WrongType`] for any other type, signed and wider integers included: llama.cpp takes them for damage too.
    pub fn u32(&self, key: &str) -> Result<Option<u32>, GgufError> {
        self.typed(key, "u32", |value| match *value {
            Value::U8(number) => Some(u32::from(number)),
            Value::U16(number) => Some(u32::from(number)),
            Value::U32(number) => Some(number),
            _ => None,
        })
    }

    /// An unsigned number of any width. `None` if the key is not there.
    ///
    /// # Errors
    /// [`GgufError::WrongType`] for any other type.
    pub fn u64(&self, key: &str) -> Result<Option<u64>, GgufError> {
        self.typed(key, "u64", |value| match *value {
            Value::U8(number) => Some(u64::from(number)),
            Value::U16(number) => Some(u64::from(number)),
            Value::U32(number) => Some(u64::from(number)),
            Value::U64(number) => Some(number),
            _ => None,
        })
    }

    /// A float of 32 bits. `None` if the key is not there.
    ///
    /// # Errors
    /// [`GgufError::WrongType`] for any other type.
    pub fn f32(&self, key: &str) -> Result<Option<f32>, GgufError> {
        self.typed(key, "f32", |value| if let Value::F32(number) = *value { Some(number) } else { None })
    }

    /// A truth value. `None` if the key is not there.
    ///
    /// # Errors
    /// [`GgufError::WrongType`] for any other type.
    pub fn bool(&self, key: &str) -> Result<Option<bool>, GgufError> {
        self.typed(key, "bool", |value| if let Value::Bool(truth) = *value { Some(truth) } else { None })
    }

    /// A text. `None` if the key is not there.
    ///
    /// # Errors
    /// [`GgufError::WrongType`] for any other type.
    pub fn str(&self, key: &str) -> Result<Option<&str>, GgufError> {
        self.typed(key, "str", |value| if let Value::String(text) = value { Some(text.as_str()) } else { None })
    }

    /// An array of strings. `None` if the key is not there.
    ///
    /// # Errors
    /// [`GgufError::WrongType`] for any other type.
    pub fn strings(&self, key: &str) -> Result<Option<&StringArray>, GgufError> {
        self.typed(key, "arr[str]", |value| match value {
            Value::Array(Array::String(strings)) => Some(strings),
            _ => None,
        })
    }

    /// Elements of an array of any type. `None` if the key is not there.
    ///
    /// # Errors
    /// [`GgufError::WrongType`] for what is not an array.
    pub fn array_len(&self, key: &str) -> Result<Option<usize>, GgufError> {
        self.typed(key, "an array", |value| if let Value::Array(array) = value { Some(array.len()) } else { None })
    }

    /// A number per layer: an array of `n_layers`, or one number for all of them. `None` if the key is not there.
    ///
    /// llama.cpp stores head counts and feed-forward widths in both ways. Arrays may be of `i32`, which is what converters
    /// write for a list of numbers, and of `bool`, as for the pattern of sliding windows.
    ///
    /// # Errors
    /// [`GgufError::WrongType`] for another type, [`GgufError::Invalid`] for another length or a negative number,
    /// [`GgufError::TooLarge`] for more layers than [`MAX_LAYERS`].
    #[doc(alias = "get_key_or_arr")]
    pub fn u32_per_layer(&self, key: &str, n_layers: u32) -> Result<Option<Vec<u32>>, GgufError> {
        let Some(entry) = self.entry(key) else { return Ok(None) };
        if n_layers > MAX_LAYERS {
            return Err(GgufError::TooLarge {
                field: format!("the number of layers for `{key}`"),
                offset: entry.offset,
                given: u64::from(n_layers),
                limit: u64::from(MAX_LAYERS),
            });
        }
        let Value::Array(array) = &entry.value else {
            return Ok(self.u32(key)?.map(|number| vec![number; n_layers as usize]));
        };
        if array.len() != n_layers as usize {
            return Err(entry.invalid(format!("{} elements", array.len()), format!("the model has {n_layers} layers")));
        }
        let numbers = match array {
            Array::U8(numbers) => numbers.iter().copied().map(u32::from).collect(),
            Array::U16(numbers) => numbers.iter().copied().map(u32::from).collect(),
            Array::U32(numbers) => numbers.clone(),
            Array::Bool(numbers) => numbers.iter().copied().map(u32::from).collect(),
            Array::I32(numbers) => numbers
                .iter()
                .map(|&number| u32::try_from(number))
                .collect::<Result<_, _>>()
                .map_err(|_| entry.invalid("partly negative".to_owned(), "it counts something".to_owned()))?,
            _ => return Err(entry.wrong_type("u32, arr[u32] or arr[i32]")),
        };
        Ok(Some(numbers))
    }

    fn typed<'a, T: 'a>(
        &'a self,
        key: &str,
        wanted: &str,
        read: impl FnOnce(&'a Value) -> Option<T>,
    ) -> Result<Option<T>, GgufError> {
        let Some(entry) = self.entry(key) else { return Ok(None) };
        read(&entry.value).map(Some).ok_or_else(|| entry.wrong_type(wanted))
    }

    /// The error for a key whose type the caller found wrong; the key must be there to have one.
    pub(super) fn wrong_type(&self, key: &str, wanted: &str) -> GgufError {
        match self.entry(key) {
            Some(entry) => entry.wrong_type(wanted),
            None => GgufError::Missing { key: key.to_owned() },
        }
    }

    /// The error for a key whose value the caller found wrong.
    pub(super) fn invalid(&self, key: &str, given: &dyn Display, rule: impl Into<String>) -> GgufError {
        GgufError::Invalid {
            field: format!("`{key}`"),
            offset: self.offset(key),
            given: given.to_string(),
            rule: rule.into(),
        }
    }
}

impl Entry {
    fn wrong_type(&self, wanted: &str) -> GgufError {
        GgufError::WrongType {
            key: self.key.clone(),
            offset: self.offset,
            wanted: wanted.to_owned(),
            given: self.value.type_name(),
        }
    }

    fn invalid(&self, given: String, rule: String) -> GgufError {
        GgufError::Invalid { field: format!("`{}`", self.key), offset: self.offset, given, rule }
    }
}
