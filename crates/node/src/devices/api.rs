//! The messages of the device plugin API, `v1beta1`, with the field numbers of `deviceplugin/v1beta1/api.proto`. Written
//! down rather than generated: they are few, and what a container is given is kept on the disk as well.
#![allow(missing_docs, reason = "the fields are the API's")]

use std::collections::BTreeMap;

use prost::Message;
use serde::{Deserialize, Serialize};

/// The only version there is.
pub const VERSION: &str = "v1beta1";
/// What a device says of itself that can be used.
pub const HEALTHY: &str = "Healthy";

/// Where the calls are.
pub mod path {
    pub const REGISTER: &str = "/v1beta1.Registration/Register";
    pub const OPTIONS: &str = "/v1beta1.DevicePlugin/GetDevicePluginOptions";
    pub const LIST_AND_WATCH: &str = "/v1beta1.DevicePlugin/ListAndWatch";
    pub const PREFERRED: &str = "/v1beta1.DevicePlugin/GetPreferredAllocation";
    pub const ALLOCATE: &str = "/v1beta1.DevicePlugin/Allocate";
    pub const PRE_START: &str = "/v1beta1.DevicePlugin/PreStartContainer";
}

/// Nothing.
#[derive(Clone, Copy, PartialEq, Eq, Message)]
pub struct Empty {}

/// What a plugin wants to be asked for.
#[derive(Clone, Copy, PartialEq, Eq, Message)]
pub struct DevicePluginOptions {
    #[prost(bool, tag = "1")]
    pub pre_start_required: bool,
    #[prost(bool, tag = "2")]
    pub get_preferred_allocation_available: bool,
}

/// A plugin makes itself known.
#[derive(Clone, PartialEq, Eq, Message)]
pub struct RegisterRequest {
    #[prost(string, tag = "1")]
    pub version: String,
    /// The name of its socket, in the directory of the agent's.
    #[prost(string, tag = "2")]
    pub endpoint: String,
    #[prost(string, tag = "3")]
    pub resource_name: String,
    #[prost(message, optional, tag = "4")]
    pub options: Option<DevicePluginOptions>,
}

/// All devices that there are.
#[derive(Clone, PartialEq, Eq, Message)]
pub struct ListAndWatchResponse {
    #[prost(message, repeated, tag = "1")]
    pub devices: Vec<Device>,
}

/// A device.
#[derive(Clone, PartialEq, Eq, Message)]
pub struct Device {
    #[prost(string, tag = "1")]
    pub id: String,
    #[prost(string, tag = "2")]
    pub health: String,
    #[prost(message, optional, tag = "3")]
    pub topology: Option<TopologyInfo>,
}

/// What a device is near to.
#[derive(Clone, PartialEq, Eq, Message)]
pub struct TopologyInfo {
    #[prost(message, repeated, tag = "1")]
    pub nodes: Vec<NumaNode>,
}

/// A NUMA node by number.
#[derive(Clone, Copy, PartialEq, Eq, Message)]
pub struct NumaNode {
    #[prost(int64, tag = "1")]
    pub id: i64,
}

/// Which of the free devices a plugin would give.
#[derive(Clone, PartialEq, Eq, Message)]
pub struct PreferredAllocationRequest {
    #[prost(message, repeated, tag = "1")]
    pub container_requests: Vec<ContainerPreferredAllocationRequest>,
}

/// The same, for one container.
#[derive(Clone, PartialEq, Eq, Message)]
pub struct ContainerPreferredAllocationRequest {
    #[prost(string, repeated, tag = "1")]
    pub available: Vec<String>,
    #[prost(string, repeated, tag = "2")]
    pub must_include: Vec<String>,
    #[prost(int32, tag = "3")]
    pub allocation_size: i32,
}

/// Which ones it would give.
#[derive(Clone, PartialEq, Eq, Message)]
pub struct PreferredAllocationResponse {
    #[prost(message, repeated, tag = "1")]
    pub container_responses: Vec<DeviceIds>,
}

/// Devices by name: `ContainerPreferredAllocationResponse`, `ContainerAllocateRequest` and `PreStartContainerRequest`.
#[derive(Clone, PartialEq, Eq, Message)]
pub struct DeviceIds {
    #[prost(string, repeated, tag = "1")]
    pub ids: Vec<String>,
}

/// Containers get devices.
#[derive(Clone, PartialEq, Eq, Message)]
pub struct AllocateRequest {
    #[prost(message, repeated, tag = "1")]
    pub container_requests: Vec<DeviceIds>,
}

/// What containers need for that.
#[derive(Clone, PartialEq, Eq, Message)]
pub struct AllocateResponse {
    #[prost(message, repeated, tag = "1")]
    pub container_responses: Vec<ContainerAllocateResponse>,
}

/// What a container with devices is made with.
#[derive(Clone, PartialEq, Eq, Message, Serialize, Deserialize)]
#[serde(default)]
pub struct ContainerAllocateResponse {
    #[prost(btree_map = "string, string", tag = "1")]
    pub envs: BTreeMap<String, String>,
    #[prost(message, repeated, tag = "2")]
    pub mounts: Vec<Mount>,
    #[prost(message, repeated, tag = "3")]
    pub devices: Vec<DeviceSpec>,
    #[prost(btree_map = "string, string", tag = "4")]
    pub annotations: BTreeMap<String, String>,
    #[prost(message, repeated, tag = "5")]
    pub cdi_devices: Vec<CdiDevice>,
}

/// A file or directory of the machine.
#[derive(Clone, PartialEq, Eq, Message, Serialize, Deserialize)]
#[serde(default)]
pub struct Mount {
    #[prost(string, tag = "1")]
    pub container_path: String,
    #[prost(string, tag = "2")]
    pub host_path: String,
    #[prost(bool, tag = "3")]
    pub read_only: bool,
}

/// A device node of the machine.
#[derive(Clone, PartialEq, Eq, Message, Serialize, Deserialize)]
#[serde(default)]
pub struct DeviceSpec {
    #[prost(string, tag = "1")]
    pub container_path: String,
    #[prost(string, tag = "2")]
    pub host_path: String,
    /// Of `r`, `w` and `m`.
    #[prost(string, tag = "3")]
    pub permissions: String,
}

/// A device that the runtime knows from a file (<https://github.com/cncf-tags/container-device-interface>).
#[derive(Clone, PartialEq, Eq, Message, Serialize, Deserialize)]
#[serde(default)]
pub struct CdiDevice {
    #[prost(string, tag = "1")]
    pub name: String,
}

#[cfg(test)]
mod tests {
    use super::*;

    /// As a plugin that was compiled from upstream's definitions writes and reads them.
    #[test]
    fn numbers_of_fields() {
        let text = |tag: u8, text: &str| [&[tag << 3 | 2, text.len() as u8], text.as_bytes()].concat();
        let part = |tag: u8, part: Vec<u8>| [vec![tag << 3 | 2, part.len() as u8], part].concat();
        let options = [1 << 3, 1, 2 << 3, 1].to_vec();
        let request = [text(1, VERSION), text(2, "x.sock"), text(3, "a.b/c"), part(4, options.clone())].concat();
        let options = DevicePluginOptions::decode(&*options).unwrap();
        assert!(options.pre_start_required && options.get_preferred_allocation_available);
        let read = RegisterRequest::decode(&*request).unwrap();
        let [version, endpoint, resource_name] = [VERSION, "x.sock", "a.b/c"].map(str::to_owned);
        assert_eq!(read, RegisterRequest { version, endpoint, resource_name, options: Some(options) });

        let device = [text(1, "d"), text(2, HEALTHY), part(3, part(1, vec![1 << 3, 5]))].concat();
        let list = ListAndWatchResponse::decode(&*part(1, device)).unwrap();
        let topology = Some(TopologyInfo { nodes: vec![NumaNode { id: 5 }] });
        assert_eq!(list.devices, [Device { id: "d".into(), health: HEALTHY.into(), topology }]);

        let asked = ContainerPreferredAllocationRequest {
            available: vec!["a".into(), "b".into()],
            must_include: vec!["a".into()],
            allocation_size: 2,
        };
        let bytes = [text(1, "a"), text(1, "b"), text(2, "a"), vec![3 << 3, 2]].concat();
        assert_eq!(PreferredAllocationRequest { container_requests: vec![asked] }.encode_to_vec(), part(1, bytes));
        let ids = DeviceIds { ids: vec!["a".into()] };
        assert_eq!(AllocateRequest { container_requests: vec![ids] }.encode_to_vec(), part(1, text(1, "a")));

        let pair = |tag: u8, key: &str| part(tag, [text(1, key), text(2, "v")].concat());
        let mount = [text(1, "/c"), text(2, "/h"), vec![3 << 3, 1]].concat();
        let node = [text(1, "/dev/c"), text(2, "/dev/h"), text(3, "rw")].concat();
        let given = [pair(1, "E"), part(2, mount), part(3, node), pair(4, "A"), part(5, text(1, "a.b/c=d"))].concat();
        let read = AllocateResponse::decode(&*part(1, given)).unwrap().container_responses.remove(0);
        let expect = ContainerAllocateResponse {
            envs: [("E".to_owned(), "v".to_owned())].into(),
            mounts: vec![Mount { container_path: "/c".into(), host_path: "/h".into(), read_only: true }],
            devices: vec![DeviceSpec {
                container_path: "/dev/c".into(),
                host_path: "/dev/h".into(),
                permissions: "rw".into(),
            }],
            annotations: [("A".to_owned(), "v".to_owned())].into(),
            cdi_devices: vec![CdiDevice { name: "a.b/c=d".into() }],
        };
        assert_eq!(read, expect);
        // What is kept on the disk is read again, also by a version that knows more.
        assert_eq!(serde_json::from_str::<ContainerAllocateResponse>("{\"later\": 1}").unwrap(), Default::default());
    }
}
