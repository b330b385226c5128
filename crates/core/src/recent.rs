//! What was used last, up to a number.

/// Values by their keys, of which those are forgotten that were not used for longest.
#[derive(Debug)]
pub struct Recent<K, V> {
    /// The latest used last, and so found first.
    entries: Vec<(K, V)>,
    most: usize,
}

impl<K: PartialEq, V: Clone> Recent<K, V> {
    /// At most `most` values, of which there are none yet.
    pub const fn new(most: usize) -> Self {
        Recent { entries: Vec::new(), most }
    }

    /// The value of a key.
    pub fn get(&mut self, key: &K) -> Option<V> {
        let found = self.entries.iter().rposition(|(of, _)| of == key)?;
        self.entries[found..].rotate_left(1);
        self.entries.last().map(|(_, value)| value.clone())
    }

    /// Adds a value, in place of one that its key has.
    pub fn put(&mut self, key: K, value: V) {
        self.entries.retain(|(of, _)| *of != key);
        if self.entries.len() == self.most {
            self.entries.remove(0);
        }
        self.entries.push((key, value));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_not_used_for_longest_is_forgotten() {
        let mut recent = Recent::new(2);
        recent.put('a', 1);
        recent.put('b', 2);
        assert_eq!(recent.get(&'a'), Some(1));
        recent.put('c', 3);
        assert_eq!(['a', 'b', 'c'].map(|key| recent.get(&key)), [Some(1), None, Some(3)]);
        recent.put('a', 4);
        assert_eq!((recent.get(&'a'), recent.get(&'c'), recent.entries.len()), (Some(4), Some(3), 2));
    }
}
