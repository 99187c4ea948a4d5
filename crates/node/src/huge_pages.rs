//! Huge pages: how many there are, how many a container may have, and volumes of them
//! (<https://kubernetes.io/docs/tasks/manage-hugepages/scheduling-hugepages/>).

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    path::Path,
};

use k8s_cri::v1 as cri;
use k8s_openapi::api::core::v1::{Container, PodSpec};

use crate::pod;

/// Where the kernel tells of them: a directory for each size.
pub const SYSTEM: &str = "/sys/kernel/mm/hugepages";
const PREFIX: &str = "hugepages-";

/// How many bytes of each size of page there are, by the size in bytes. None if the kernel has no huge pages.
pub fn detect(system: &Path) -> BTreeMap<u64, u64> {
    let entries = fs::read_dir(system).into_iter().flatten().flatten();
    let read = |entry: fs::DirEntry| {
        let kibibytes = entry.file_name().to_str()?.strip_prefix(PREFIX)?.strip_suffix("kB")?.parse::<u64>().ok()?;
        let count: u64 = fs::read_to_string(entry.path().join("nr_hugepages")).ok()?.trim().parse().ok()?;
        let size = kibibytes.checked_mul(1024)?;
        Some((size, size.saturating_mul(count)))
    };
    entries.filter_map(read).collect()
}

/// The name of the resource: `hugepages-2Mi`.
pub fn resource(size: u64) -> String {
    format!("{PREFIX}{}", in_units(size, ["Ki", "Mi", "Gi"]))
}

/// The size as cgroups name it: `2MB`.
fn of_cgroup(size: u64) -> String {
    in_units(size, ["KB", "MB", "GB"])
}

fn in_units(size: u64, units: [&str; 3]) -> String {
    let (mut number, mut unit) = (size / 1024, units[0]);
    for next in &units[1..] {
        if number == 0 || number % 1024 != 0 {
            break;
        }
        (number, unit) = (number / 1024, next);
    }
    format!("{number}{unit}")
}

/// The size that a resource is of, in bytes.
fn size_of(resource: &str) -> Option<u64> {
    let size = pod::quantity::units(resource.strip_prefix(PREFIX)?)?;
    u64::try_from(size).ok().filter(|size| *size > 0)
}

/// What a container may have of each size: nothing, of those that it does not ask for.
pub fn limits(container: &Container, sizes: impl Iterator<Item = u64>) -> Vec<cri::HugepageLimit> {
    let limits = container.resources.as_ref().and_then(|resources| resources.limits.as_ref());
    let asked = |size: u64| {
        let mut named = limits.into_iter().flatten().filter(|(name, _)| size_of(name) == Some(size));
        named.next().and_then(|(_, quantity)| u64::try_from(pod::quantity::units(&quantity.0)?).ok())
    };
    sizes.map(|size| cri::HugepageLimit { page_size: of_cgroup(size), limit: asked(size).unwrap_or(0) }).collect()
}

/// The size of the pages of a volume of this medium, in bytes; `None` if it is not one of huge pages.
///
/// # Errors
/// If the medium does not say which, and the pod asks for none, or for several.
pub fn of_medium(medium: &str, spec: &PodSpec) -> Result<Option<u64>, String> {
    if medium != "HugePages" {
        let size = medium.strip_prefix("HugePages-").map(|size| size_of(&format!("{PREFIX}{size}")));
        return size.map(|size| size.ok_or_else(|| format!("medium {medium:?} names no size of pages"))).transpose();
    }
    let containers = spec.containers.iter().chain(spec.init_containers.iter().flatten());
    let resources = containers.filter_map(|container| container.resources.as_ref());
    let named = resources.flat_map(|r| r.requests.iter().chain(&r.limits).flat_map(BTreeMap::keys));
    let sizes: BTreeSet<u64> = named.filter_map(|name| size_of(name)).collect();
    match sizes.len() {
        1 => Ok(sizes.first().copied()),
        0 => Err("medium \"HugePages\" needs a container that asks for huge pages (hugepages-2Mi, for example)".into()),
        _ => Err("medium \"HugePages\" can be any of several sizes: name one, as in \"HugePages-2Mi\"".into()),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    fn container(resources: Value) -> Container {
        serde_json::from_value(json!({"name": "c", "resources": resources})).unwrap()
    }

    #[test]
    fn what_the_kernel_says() {
        let system = tempfile::tempdir().unwrap();
        for (name, count) in [("hugepages-2048kB", "4\n"), ("hugepages-1048576kB", "0\n"), ("other", "1")] {
            let directory = system.path().join(name);
            fs::create_dir(&directory).unwrap();
            fs::write(directory.join("nr_hugepages"), count).unwrap();
        }
        assert_eq!(detect(system.path()), BTreeMap::from([(2 << 20, 8 << 20), (1 << 30, 0)]));
        assert_eq!(detect(Path::new("/nowhere")), BTreeMap::new());
    }

    #[test]
    fn names() {
        for (size, name, cgroup) in [(2 << 20, "2Mi", "2MB"), (1 << 30, "1Gi", "1GB"), (64 << 10, "64Ki", "64KB")] {
            assert_eq!((resource(size), of_cgroup(size)), (format!("hugepages-{name}"), cgroup.to_owned()));
            assert_eq!(size_of(&resource(size)), Some(size));
        }
        assert_eq!((size_of("memory"), size_of("hugepages-x"), size_of("hugepages-0")), (None, None, None));
    }

    #[test]
    fn a_container_has_what_it_asks_for_and_no_more() {
        let sizes = || [2 << 20, 1 << 30].into_iter();
        let limits = |resources| {
            let found = limits(&container(resources), sizes());
            found.into_iter().map(|l| (l.page_size, l.limit)).collect::<Vec<_>>()
        };
        assert_eq!(
            limits(json!({"limits": {"hugepages-2Mi": "4Mi", "memory": "1Gi"}})),
            [("2MB".to_owned(), 4 << 20), ("1GB".to_owned(), 0)]
        );
        assert_eq!(limits(json!({})), [("2MB".to_owned(), 0), ("1GB".to_owned(), 0)]);
    }

    #[test]
    fn volumes() {
        let spec = |names: &[&str]| {
            let amounts: BTreeMap<&str, &str> = names.iter().map(|name| (*name, "1Gi")).collect();
            let spec = json!({"containers": [{"name": "c", "resources": {"limits": amounts}}]});
            serde_json::from_value::<PodSpec>(spec).unwrap()
        };
        let both = spec(&["hugepages-2Mi", "hugepages-1Gi"]);
        assert_eq!(of_medium("", &both), Ok(None));
        assert_eq!(of_medium("Memory", &both), Ok(None));
        assert_eq!(of_medium("HugePages-2Mi", &both), Ok(Some(2 << 20)));
        assert_eq!(of_medium("HugePages", &spec(&["hugepages-1Gi", "cpu"])), Ok(Some(1 << 30)));
        assert!(of_medium("HugePages", &both).unwrap_err().contains("name one"));
        assert!(of_medium("HugePages", &spec(&[])).unwrap_err().contains("needs a container"));
        assert!(of_medium("HugePages-much", &both).unwrap_err().contains("names no size"));
    }
}
