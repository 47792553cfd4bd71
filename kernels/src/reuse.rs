//! Lists that are made anew at every call, in memory that stays.
//!
//! Secret: that a vector's memory outlives what was in it.

/// A list of something else, or of something that lives as long as something else, in the memory of `list`, whose items
/// go. That memory is kept where items of both are of one size.
pub fn reused<A, B>(mut list: Vec<A>) -> Vec<B> {
    list.clear();
    // What is collected from a vector's own iterator stays where it is.
    let none = list.into_iter().map(|_| unreachable!("it is empty"));
    none.collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_list_keeps_its_memory() {
        let mut list: Vec<&'static str> = Vec::with_capacity(100);
        list.push("here");
        let at = list.as_ptr().addr();
        let text = String::from("there");
        let mut other: Vec<&str> = reused(list);
        assert!(other.is_empty());
        assert_eq!(other.capacity(), 100);
        other.push(&text);
        assert_eq!(other.as_ptr().addr(), at);
    }
}
