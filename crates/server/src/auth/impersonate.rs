//! Acting as somebody else
//! (<https://kubernetes.io/docs/reference/access-authn-authz/authentication/#user-impersonation>).

use std::collections::BTreeMap;

use http::HeaderMap;

use super::{AUTHENTICATED, UNAUTHENTICATED, UserInfo, authorize::Attributes};
use crate::{
    Server,
    error::{ApiError, Result},
};

const PREFIX: &str = "impersonate-";
const ACCOUNT: &str = "system:serviceaccount:";

/// Who a request is to be taken for; `None` if it says nothing about that.
fn wanted(headers: &HeaderMap) -> Result<Option<UserInfo>> {
    let mut user = UserInfo::default();
    let (mut extra, mut asked) = (BTreeMap::<String, Vec<String>>::new(), false);
    for (name, value) in headers {
        let Some(what) = name.as_str().strip_prefix(PREFIX) else { continue };
        asked = true;
        let value = value.to_str().map_err(|_| ApiError::bad_request(format!("{name}: not a text")))?.to_owned();
        match what {
            "user" => user.username = value,
            "group" => user.groups.push(value),
            "uid" => user.uid = value,
            _ => match what.strip_prefix("extra-") {
                Some(key) => extra.entry(decode(key)).or_default().push(value),
                None => {
                    return Err(ApiError::bad_request(format!(
                        "{name}: no such header; known are Impersonate-User, -Group, -Uid and -Extra-KEY"
                    )));
                }
            },
        }
    }
    if !asked {
        return Ok(None);
    }
    if user.username.is_empty() {
        return Err(ApiError::bad_request("Impersonate-User: Required value: groups and extras are those of a user"));
    }
    user.extra = extra;
    Ok(Some(user))
}

/// Keys of extras are percent-encoded, since names of headers have no case and few characters.
fn decode(key: &str) -> String {
    percent_encoding::percent_decode_str(key).decode_utf8_lossy().into_owned()
}

/// Who is asked whether somebody may act as somebody else.
pub(crate) trait Deciding {
    /// `Ok` if they may; else why not.
    fn decide(
        &self,
        user: &UserInfo,
        attributes: &Attributes<'_>,
    ) -> impl Future<Output = std::result::Result<String, String>> + Send;
}

impl Deciding for Server {
    async fn decide(&self, user: &UserInfo, attributes: &Attributes<'_>) -> std::result::Result<String, String> {
        self.authorize(user, attributes).await
    }
}

/// Takes a request for that of the user whom its headers name, if who sends it may do that.
pub(crate) async fn impersonate(deciding: &impl Deciding, user: UserInfo, headers: &mut HeaderMap) -> Result<UserInfo> {
    let Some(mut wanted) = wanted(headers)? else { return Ok(user) };
    let account = wanted.username.strip_prefix(ACCOUNT).and_then(|account| account.split_once(':'));
    let may = async |group: &str, resource: &str, subresource: &str, namespace: &str, name: &str| {
        let verb = "impersonate";
        let a = Attributes { verb, group, resource, subresource, namespace, name, ..Default::default() };
        deciding.decide(&user, &a).await.map(|_| ()).map_err(|why| crate::denied(&user, &a, &why))
    };
    match account {
        Some((namespace, name)) => may("", "serviceaccounts", "", namespace, name).await?,
        None => may("", "users", "", "", &wanted.username).await?,
    }
    for group in &wanted.groups {
        may("", "groups", "", "", group).await?;
    }
    if !wanted.uid.is_empty() {
        may("authentication.k8s.io", "uids", "", "", &wanted.uid).await?;
    }
    for (key, values) in &wanted.extra {
        for value in values {
            may("authentication.k8s.io", "userextras", key, "", value).await?;
        }
    }
    if let (Some((namespace, _)), true) = (account, wanted.groups.is_empty()) {
        wanted.groups = vec!["system:serviceaccounts".into(), format!("system:serviceaccounts:{namespace}")];
    }
    let own = if wanted.username == "system:anonymous" { UNAUTHENTICATED } else { AUTHENTICATED };
    if !wanted.is_in(own) {
        wanted.groups.push(own.to_owned());
    }
    // What follows must not see them again: a request that is passed on has been decided.
    let names: Vec<_> = headers.keys().filter(|name| name.as_str().starts_with(PREFIX)).cloned().collect();
    names.iter().for_each(|name| {
        headers.remove(name);
    });
    Ok(wanted)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Some may take one name, and one group.
    struct Some_;

    impl Deciding for Some_ {
        async fn decide(&self, _: &UserInfo, a: &Attributes<'_>) -> std::result::Result<String, String> {
            let known = [("users", "jane"), ("groups", "devs"), ("serviceaccounts", "robot"), ("userextras", "x")];
            let ok = a.verb == "impersonate" && known.contains(&(a.resource, a.name));
            if ok { Ok(String::new()) } else { Err(String::new()) }
        }
    }

    #[test]
    fn only_what_one_may() {
        let check = |headers: &[(&'static str, &str)], expect: std::result::Result<(&str, &[&str]), &str>| {
            let mut map = HeaderMap::new();
            headers.iter().for_each(|(name, value)| {
                map.append(*name, value.parse().unwrap());
            });
            let found = futures::executor::block_on(impersonate(&Some_, UserInfo::new("me", &[]), &mut map));
            match (found, expect) {
                (Ok(user), Ok((name, groups))) => {
                    assert_eq!(
                        (&*user.username, user.groups.iter().map(|g| &**g).collect::<Vec<_>>()),
                        (name, groups.to_vec())
                    );
                    assert!(map.is_empty(), "{map:?}");
                }
                (Err(error), Err(text)) => assert!(error.message.contains(text), "{}", error.message),
                (found, _) => panic!("{headers:?}: {found:?}"),
            }
        };
        check(&[], Ok(("me", &["system:authenticated"])));
        check(&[("impersonate-user", "jane")], Ok(("jane", &["system:authenticated"])));
        check(&[("impersonate-user", "joe")], Err("cannot impersonate resource \"users\""));
        check(
            &[("impersonate-user", "jane"), ("impersonate-group", "devs")],
            Ok(("jane", &["devs", "system:authenticated"])),
        );
        check(
            &[("impersonate-user", "jane"), ("impersonate-group", "system:masters")],
            Err("cannot impersonate resource \"groups\""),
        );
        check(
            &[("impersonate-user", "system:serviceaccount:a:robot")],
            Ok((
                "system:serviceaccount:a:robot",
                &["system:serviceaccounts", "system:serviceaccounts:a", "system:authenticated"],
            )),
        );
        check(&[("impersonate-group", "devs")], Err("Impersonate-User: Required value"));
        check(&[("impersonate-user", "jane"), ("impersonate-uid", "1")], Err("uids"));
        check(
            &[("impersonate-user", "jane"), ("impersonate-extra-scopes", "x")],
            Ok(("jane", &["system:authenticated"])),
        );
        check(&[("impersonate-user", "jane"), ("impersonate-extra-scopes", "y")], Err("userextras/scopes"));
        check(&[("impersonate-user", "jane"), ("impersonate-role", "x")], Err("no such header"));
    }
}
