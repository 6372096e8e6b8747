// The bodies of the communicators, compiled once.
#include "dualpipe/detail/comm/activity.ipp"
#include "dualpipe/detail/comm/communicator.ipp"
#include "dualpipe/detail/comm/local.ipp"
#include "dualpipe/detail/comm/message.ipp"
#include "dualpipe/detail/comm/message_communicator.ipp"
#include "dualpipe/detail/comm/message_tensors.ipp"
#include "dualpipe/detail/comm/transport.ipp"
