//! Who asks, as the number that nodes tell tenants apart by.
//!
//! Tenants share a node fairly and never see each other's prefix cache. Who has another API key,
//! another `user` or another `cache_salt` is another tenant; on every coordinator the same one, so
//! that its prefixes are found again.

/// The tenant of an HTTP request; 0 where nothing is known.
pub(super) fn of(key: Option<&[u8]>, user: Option<&str>, salt: Option<&str>) -> u64 {
    number([key, user.map(str::as_bytes), salt.map(str::as_bytes)])
}

/// The tenant of a gRPC request, which names itself by a number: with an API key it is a number of
/// that key's owner.
pub(super) fn of_number(key: Option<&[u8]>, number_of: u64) -> u64 {
    match (key, number_of) {
        (None, number_of) => number_of,
        (Some(_), 0) => number([key, None, None]),
        (Some(_), number_of) => number([key, Some(&number_of.to_le_bytes()), None]),
    }
}

fn number(parts: [Option<&[u8]>; 3]) -> u64 {
    if parts.iter().all(Option::is_none) {
        return 0;
    }
    let mut hasher = blake3::Hasher::new_derive_key("guild.inference.v1 tenant");
    for part in parts {
        let part = part.map_or(&[][..], |part| part);
        hasher.update(&(part.len() as u64).to_le_bytes());
        hasher.update(part);
    }
    let mut first = [0; 8];
    hasher.finalize_xof().fill(&mut first);
    // 0 is nobody.
    u64::from_le_bytes(first).max(1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn whoever_differs_is_another_tenant() {
        let all = [
            of(None, None, None),
            of(Some(b"k"), None, None),
            of(None, Some("k"), None),
            of(None, None, Some("k")),
            of(Some(b"k"), Some("u"), None),
            of(Some(b"ku"), None, None),
            of_number(None, 7),
            of_number(Some(b"k"), 7),
            of_number(Some(b"l"), 7),
        ];
        for (i, a) in all.iter().enumerate() {
            assert_eq!(all.iter().position(|b| a == b), Some(i));
        }
        assert_eq!(all[0], 0);
        assert_eq!(of_number(Some(b"k"), 0), of(Some(b"k"), None, None));
    }
}
