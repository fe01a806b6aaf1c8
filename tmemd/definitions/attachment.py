# SPDX-License-Identifier: BSD-3-Clause
"""What a guest is to be given to have a device: the words of docs/guests.md and docs/cache-devices.md."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final, TypeAlias

from tmemd.definitions.definition import Definition
from tmemd.definitions.place import Place
from tmemd.store.poolfile import PoolError

Kind: TypeAlias = str  # one of KINDS

_QEMU: Final = """\
-blockdev driver=nbd,node-name=tmem,server.type=unix,server.path={socket},export={name},reconnect-delay=600,discard=unmap
-device virtio-blk-pci,drive=tmem,serial=tmem
"""  # noqa: E501 - as they are to be pasted
_QEMU_VHOST: Final = """\
-object memory-backend-memfd,id=shared,size=4G,share=on -machine memory-backend=shared
-chardev socket,id={name},path={vhost},reconnect=1
-device vhost-user-blk-pci,chardev={name}
"""
_QEMU_IMAGE: Final = """\
-blockdev driver=nbd,node-name={name},server.type=unix,server.path={socket},export={name},read-only=on,reconnect-delay=600
-blockdev driver=qcow2,node-name=disk,file.driver=file,file.filename=guest1.qcow2,backing={name}
-device virtio-blk-pci,drive=disk
"""  # noqa: E501
_LIBVIRT: Final = """\
<disk type='network' device='disk'>
  <driver name='qemu' type='raw' discard='unmap' error_policy='stop' rerror_policy='stop'/>
  <source protocol='nbd' name='{name}'>
    <host transport='unix' socket='{socket}'/>
  </source>
  <target dev='vdb' bus='virtio'/>
  <serial>tmem</serial>
</disk>
"""
_LIBVIRT_VHOST: Final = """\
<memoryBacking>
  <source type='memfd'/>
  <access mode='shared'/>
</memoryBacking>

<disk type='vhostuser' device='disk'>
  <driver name='qemu' type='raw'/>
  <source type='unix' path='{vhost}'>
    <reconnect enabled='yes' timeout='1'/>
  </source>
  <target dev='vdb' bus='virtio'/>
</disk>
"""
_LIBVIRT_IMAGE: Final = """\
<qemu:commandline>
  <qemu:arg value='-blockdev'/>
  <qemu:arg value='driver=nbd,node-name={name},server.type=unix,server.path={socket},export={name},read-only=on,reconnect-delay=600'/>
  <qemu:arg value='-blockdev'/>
  <qemu:arg value='driver=qcow2,node-name=disk,file.driver=file,file.filename=/var/lib/libvirt/images/guest1.qcow2,backing={name}'/>
  <qemu:arg value='-device'/>
  <qemu:arg value='{{"driver":"virtio-blk-pci","drive":"disk","bootindex":1}}'/>
</qemu:commandline>
"""  # noqa: E501
_NBD: Final = "nbd+unix:///{name}?socket={socket}\n"
_FSTAB: Final = "/dev/disk/by-id/virtio-{serial} none swap nofail,discard,pri=100 0 0\n"

_Texts: TypeAlias = Mapping[Kind, str]
_SWAP: Final[_Texts] = {"qemu": _QEMU, "libvirt": _LIBVIRT, "nbd": _NBD, "fstab": _FSTAB}
_VHOST: Final[_Texts] = {"qemu": _QEMU_VHOST, "libvirt": _LIBVIRT_VHOST, "fstab": _FSTAB}
_IMAGE: Final[_Texts] = {"qemu": _QEMU_IMAGE, "libvirt": _LIBVIRT_IMAGE, "nbd": _NBD}
_DISK: Final[_Texts] = {"qemu": _QEMU, "libvirt": _LIBVIRT, "nbd": _NBD}
KINDS: Final = ("qemu", "libvirt", "nbd", "fstab")


def texts(place: Place, device: Definition, *, vhost: bool = False) -> dict[Kind, str]:
    """What to paste, by where; with *vhost*, for the virtio door. Raises PoolError where it has no such door."""
    if vhost and not device.vhost:
        raise PoolError(
            f"device {device.name} has no virtio door: put vhost={place.vhost(device.name)} into OPTIONS of"
            f" {place.definition(device.name)}, and restart it"
        )
    values = {
        "name": device.name, "socket": place.socket(device.name), "vhost": device.vhost,
        "serial": device.name if vhost else "tmem",
    }  # fmt: skip
    return {kind: text.format(**values) for kind, text in _of(device, vhost=vhost).items()}


def _of(device: Definition, *, vhost: bool) -> _Texts:
    if device.source and not device.is_written_through and not vhost:
        return _IMAGE
    found = _VHOST if vhost else _DISK if device.source else _SWAP
    return {kind: text for kind, text in found.items() if kind != "fstab"} if device.source else found
