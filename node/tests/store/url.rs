//! Naming a store.

use guild_node::store::StoreUrl;

#[test]
fn a_store_is_named_by_its_url() {
    for url in [
        "memory",
        "embedded:/var/lib/guild/store",
        "embedded:here",
        "etcd://10.0.0.1:2379/guild",
        "etcd://a:2379,b:2379,[::1]:2379/prod/guild",
    ] {
        assert_eq!(url.parse::<StoreUrl>().unwrap().to_string(), url);
    }
    assert_eq!(
        "etcd://a:1".parse::<StoreUrl>().unwrap().to_string(),
        "etcd://a:1/guild"
    );
    assert_eq!(StoreUrl::default(), StoreUrl::Memory);
}

#[test]
fn what_names_no_store_is_refused_with_the_forms() {
    for url in [
        "",
        "memory:",
        "embedded:",
        "embedded:/var/lib/",
        "etcd://",
        "etcd:///guild",
        "etcd://host",
        "etcd://host:2379,",
        "etcd://me@host:2379",
        "http://host:2379",
    ] {
        let error = url.parse::<StoreUrl>().unwrap_err().to_string();
        assert!(error.contains("embedded:PATH"), "{url}: {error}");
    }
}
