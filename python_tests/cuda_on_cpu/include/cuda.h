// In place of the driver API's header.
#pragma once

#include "cuda_on_cpu/kernel/driver.h"
